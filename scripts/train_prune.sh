#!/usr/bin/env bash
# Learn which vision tokens a LLaVA can do without.
#
# Without any variable set: prepares the testbed (a tiny LLaVA and mosaics of real pictures), trains pruners with two
# processes under DeepSpeed ZeRO-2, evaluates, and prints what was gained. Minutes on two CPU cores, no download.
#
# The real recipe, in the shape of LLaVA's own finetune_task.sh:
#   MODEL=liuhaotian/llava-v1.5-7b DATA=llava_v1_5_mix665k.json IMAGES=playground/data GPUS=8 ZERO=3 PRESET=best \
#       bash scripts/train_prune.sh
# ADAPT=DIR leaves the pruners in DIR as they are and trains LoRA to answer from what they keep, BASELINE=NAME from what
# a training-free method keeps (with --prune_target_token_num N).
# LORA=1 trains LoRA adapters beside the pruners, BITS=4 (or 8) loads the base quantised, HOSTFILE=FILE runs on
# several machines. Arguments of this script go to the training as they are: bash scripts/train_prune.sh --prune_alignment mse
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD

MODEL=${MODEL:-}                       # a LLaVA checkpoint; empty: the testbed's
DATA=${DATA:-}                         # LLaVA conversation JSON
IMAGES=${IMAGES:-}                     # folder that its image paths are relative to
SEED=${SEED:-0}
OUT=${OUT:-}                           # empty: a folder under outputs/ named after all this
GPUS=${GPUS:-}                         # processes on this machine; empty: all GPUs, or 2 on a CPU
ZERO=${ZERO:-2}                        # 2, 3, 2_offload or 3_offload
PRESET=${PRESET:-}                     # a preset's name or a YAML file
ADAPT=${ADAPT:-}                       # folder of trained pruners: LoRA adapts to them, with the same PRESET
BASELINE=${BASELINE:-}                 # name of a training-free method: LoRA adapts to it
ADAPTS=$([ -n "$ADAPT$BASELINE" ] && echo 1 || echo 0)
LORA=${LORA:-$ADAPTS}                  # 1: LoRA on the language model too
BITS=${BITS:-16}                       # 4 or 8: quantised base
HOSTFILE=${HOSTFILE:-}                 # DeepSpeed's list of machines
PORT=${PORT:-29500}

NAME=${MODEL:+$(basename "$MODEL")-}$([ "$ADAPTS" = 1 ] && echo "adapted${BASELINE:+-$BASELINE}" || echo prune)
[ "$SEED" = 0 ] || NAME=$NAME-seed$SEED
[ "$LORA" != 1 ] || NAME=$([ -n "$MODEL" ] || echo llava-mosaic-)$NAME-lora
OUT=${OUT:-outputs/$NAME}
if [[ "$LORA" = 1 && "$(basename "$OUT")" != *llava*lora* ]]; then
    # LLaVA's loader tells a LoRA checkpoint by its folder's name
    echo "train_prune.sh: with LORA=1 the last part of OUT must contain 'llava' and 'lora', not $OUT" >&2; exit 2
fi

bash scripts/setup.sh
export PATH=$ROOT/.venv/bin:$PATH
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export TOKENIZERS_PARALLELISM=false

HAVE_GPU=$(python -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$HAVE_GPU" = 1 ]; then
    GPUS=${GPUS:-$(python -c 'import torch; print(torch.cuda.device_count())')}
    BF16=${BF16:-True}
else
    GPUS=${GPUS:-2}
    BF16=False                         # bf16 is far slower than fp32 on a CPU
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

if [ "$ADAPTS" = 1 ]; then
    LR=${LR:-$([ -n "$MODEL" ] && echo 2e-4 || echo 5e-4)}   # of LLaVA's own LoRA recipe; of the testbed
fi
if [ -z "$MODEL" ]; then
    TESTBED=${ADAPT:-$OUT}/testbed
    LORA_R=${LORA_R:-32}
    LORA_ALPHA=${LORA_ALPHA:-64}
    python -m llava_prune.testbed.prepare --out "$TESTBED" --train "${TRAIN_SAMPLES:-4000}" --test "${TEST_QUESTIONS:-600}"
    MODEL=$TESTBED/llava-mosaic-tiny
    DATA=$TESTBED/train.json
    IMAGES=$TESTBED
    PRESET=${PRESET:-mosaic}
    VISION_TOWER=${VISION_TOWER:-$MODEL/vision_tower}
    SELECT_LAYER=${SELECT_LAYER:--1}
    STEPS=${STEPS:-240}
    BATCH=${BATCH:-8}
    SAVE_STEPS=${SAVE_STEPS:-60}
    LOGGING_STEPS=${LOGGING_STEPS:-10}
    MAX_LENGTH=${MAX_LENGTH:-512}
    CHECKPOINTING=${CHECKPOINTING:-False}
    WORKERS=${WORKERS:-0}
    REPORT_TO=${REPORT_TO:-tensorboard}
else
    TESTBED=
    : "${DATA:?set DATA to a JSON file in the conversation format of LLaVA}"
    : "${IMAGES:?set IMAGES to the folder that the image paths in DATA are relative to}"
fi

LORA_FLAGS=()
if [ "$LORA" = 1 ]; then
    LORA_FLAGS=(--lora_enable True --lora_r "${LORA_R:-128}" --lora_alpha "${LORA_ALPHA:-256}" --mm_projector_lr 2e-5)
fi
ADAPT_FLAGS=()
if [ -n "$ADAPT" ]; then
    ADAPT_FLAGS=(--prune_start "$ADAPT" --prune_train_pruners False)
fi
if [ -n "$BASELINE" ]; then
    ADAPT_FLAGS+=(--prune_baseline "$BASELINE")
fi
LAUNCHER=(deepspeed --master_port "$PORT")
if [ -n "$HOSTFILE" ]; then
    LAUNCHER+=(--hostfile "$HOSTFILE")
else
    LAUNCHER+=(--num_gpus "$GPUS")
fi

"${LAUNCHER[@]}" --module llava_prune.train \
    --deepspeed "zero_configs/zero$ZERO.json" \
    --prune_config "${PRESET:-default}" \
    "${LORA_FLAGS[@]}" \
    "${ADAPT_FLAGS[@]}" \
    --bits "$BITS" \
    --model_name_or_path "$MODEL" \
    --version v1 \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}" \
    --mm_projector_type "${PROJECTOR:-mlp2x_gelu}" \
    --mm_vision_select_layer "${SELECT_LAYER:--2}" \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 "$BF16" \
    --tf32 "${TF32:-$([ "$HAVE_GPU" = 1 ] && echo True || echo False)}" \
    --output_dir "$OUT" \
    --num_train_epochs "${EPOCHS:-1}" \
    --max_steps "${STEPS:--1}" \
    --per_device_train_batch_size "${BATCH:-8}" \
    --gradient_accumulation_steps "${ACCUMULATION:-1}" \
    --evaluation_strategy no \
    --save_strategy steps \
    --save_steps "${SAVE_STEPS:-500}" \
    --save_total_limit 2 \
    --learning_rate "${LR:-2e-5}" \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type "${SCHEDULER:-cosine}" \
    --logging_steps "${LOGGING_STEPS:-1}" \
    --model_max_length "${MAX_LENGTH:-2048}" \
    --gradient_checkpointing "${CHECKPOINTING:-True}" \
    --dataloader_num_workers "${WORKERS:-4}" \
    --lazy_preprocess True \
    --report_to "${REPORT_TO:-tensorboard}" \
    --seed "$SEED" \
    "$@"

CHECKPOINT=(--model-path "$MODEL")
[ "$LORA" != 1 ] || CHECKPOINT=(--model-path "$OUT" --model-base "$MODEL")
if [ -n "$BASELINE" ]; then
    echo "LoRA is in $OUT; hold it against others with:"
    echo "  python -m llava_prune compare --model $OUT --model_base $MODEL --methods $BASELINE --budgets ..."
    exit 0
fi
if [ -z "$TESTBED" ]; then
    echo "pruners are in $OUT; answer any LLaVA benchmark with them:"
    echo "  python -m llava_prune run --pruners $OUT --mode hard -m llava.eval.model_vqa_loader ${CHECKPOINT[*]} ..."
    exit 0
fi

evaluate() {
    local checkpoint=("${CHECKPOINT[@]}")
    # what an adapted model is measured against is the base as it was
    [ "$1" != origin ] || [ -z "$ADAPT" ] || checkpoint=(--model-path "$MODEL")
    python -m llava_prune run \
        --pruners "$OUT" \
        --mode "$1" \
        --report "$OUT/$1.report.jsonl" \
        -m llava.eval.model_vqa_loader \
        "${checkpoint[@]}" \
        --image-folder "$IMAGES" \
        --question-file "$TESTBED/test.jsonl" \
        --answers-file "$OUT/$1.jsonl" \
        --temperature 0 \
        --max_new_tokens 16 \
        --conv-mode v1
}
evaluate origin 2> "$OUT/origin.log" &
ORIGIN=$!
evaluate hard
wait "$ORIGIN" || { cat "$OUT/origin.log" >&2; exit 1; }
python -m llava_prune.testbed.results --data "$TESTBED" --out "$OUT"
