#!/bin/bash
# TextVQA: scored here
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin textvqa
need "$EVAL/textvqa/llava_textvqa_val_v051_ocr.jsonl" "$EVAL_ZIP"
need "$EVAL/textvqa/TextVQA_0.5.1_val.json" "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"
need "$EVAL/textvqa/train_images" "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
have_all

answer llava.eval.model_vqa_loader \
    --question-file "$EVAL/textvqa/llava_textvqa_val_v051_ocr.jsonl" \
    --image-folder "$EVAL/textvqa/train_images" \
    --answers-file "$EVAL/textvqa/answers/$CKPT.jsonl" \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

score textvqa \
    --annotation-file "$EVAL/textvqa/TextVQA_0.5.1_val.json" \
    --question-file "$EVAL/textvqa/llava_textvqa_val_v051_ocr.jsonl" \
    --result-file "$EVAL/textvqa/answers/$CKPT.jsonl"
