#!/bin/bash
# LLaVA-Bench (In-the-Wild): answers for GPT-4's review, which LLaVA's eval_gpt_review_bench.py asks for
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

WILD=$EVAL/llava-bench-in-the-wild
WILD_FROM="https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"

begin llavabench
need "$WILD/questions.jsonl" "$WILD_FROM"
need "$WILD/images" "$WILD_FROM"
have_all

answer llava.eval.model_vqa \
    --question-file "$WILD/questions.jsonl" \
    --image-folder "$WILD/images" \
    --answers-file "$WILD/answers/$CKPT.jsonl" \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

score submission \
    --metric "GPT-4 review" \
    --question-file "$WILD/questions.jsonl" \
    --result-file "$WILD/answers/$CKPT.jsonl" \
    --file "$WILD/answers/$CKPT.jsonl"

cat <<NEXT
for the review, in a LLaVA checkout with openai<1 and its key set:
  python llava/eval/eval_gpt_review_bench.py \\
      --question $WILD/questions.jsonl \\
      --context $WILD/context.jsonl \\
      --rule llava/eval/table/rule.json \\
      --answer-list $WILD/answers_gpt4.jsonl $WILD/answers/$CKPT.jsonl \\
      --output $WILD/reviews/$CKPT.jsonl
  python llava/eval/summarize_gpt_review.py -f $WILD/reviews/$CKPT.jsonl
NEXT
