#!/usr/bin/env bash
# Runs the test suite on all stacks, making the environments it needs: bash scripts/test.sh [pytest arguments]
#
#   STACKS=llava bash scripts/test.sh -k law      one stack, some tests
#   WORKERS=4                                     so many test files side by side, each with one thread
set -euo pipefail
cd "$(dirname "$0")/.."

STACKS=${STACKS:-llava hf lmms}
WORKERS=${WORKERS:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} TOKENIZERS_PARALLELISM=false
for STACK in $STACKS; do
    bash scripts/setup.sh "$STACK"
done

if [[ " $STACKS " == *" llava "* ]]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/python -m pytest -n "$WORKERS" --dist loadfile "$@"
fi
if [[ " $STACKS " == *" hf "* ]]; then
    # DeepSpeed's compiled operator is kept apart: each stack would otherwise rebuild the other's
    TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$HOME/.cache/llava_prune_hf_extensions} \
        .venv-hf/bin/python -m pytest -n "$WORKERS" --dist loadfile \
        tests/hf tests/test_budget.py tests/test_rows.py tests/test_guards.py "$@"
fi
if [[ " $STACKS " == *" lmms "* ]]; then
    # a filter may leave nothing of these few tests: pytest's status 5
    .venv-lmms/bin/python -m pytest tests/lmms "$@" || [ $? = 5 ]
fi
