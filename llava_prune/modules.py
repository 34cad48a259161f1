"""Building blocks shared by pruner, merger and discriminator."""

import torch.nn.functional as F
from torch import Tensor, nn


def init_weights(module: nn.Module) -> None:
    """Initialise every Linear and LayerNorm explicitly.

    LLaVA's `disable_torch_init` turns their own `reset_parameters` into no-ops, which leaves raw memory.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


class CrossAttention(nn.Module):
    """Multi-head cross-attention from its own Linears.

    `nn.MultiheadAttention` reads its parameters outside their modules' forward, which is empty under ZeRO-3. The
    names differ from the decoder's `q_proj` .. `o_proj` so that PEFT's suffix matching leaves them alone.

    Args:
        query_dim, context_dim: widths of the two inputs.
        dim: inner width, divisible by `heads`.
        output_dim: width of the output, `dim` unless given.
        qk_norm: normalise the queries and keys of each head (Dehghani et al. 2023, arXiv:2302.05442, section 2).
            Scores then stay within the square root of a head's width, times the learned gains. Else they can grow
            without end, and of very large ones fused attention has a backward pass of NaN in half precision.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        dim: int,
        heads: int,
        output_dim: int | None = None,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_key = (
            nn.LayerNorm(dim // heads, bias=False) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.to_query = nn.Linear(query_dim, dim)
        # a bias would add the same to all scores of a query; one of values, whose weights add up to 1, to the output
        self.to_key = nn.Linear(context_dim, dim, bias=False)
        self.to_value = nn.Linear(context_dim, dim, bias=False)
        self.to_output = nn.Linear(dim, output_dim or dim)

    def forward(self, query: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """(B, N, query_dim), (B, S, context_dim), (B, S) bool, fp32 bias or None -> (B, N, output_dim)."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query = self.norm_query(split(self.to_query(query)))
        key = self.norm_key(split(self.to_key(context)))
        value = split(self.to_value(context))
        mask = None if context_mask is None else context_mask[:, None, None, :]
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_output(attended.transpose(1, 2).flatten(2))
