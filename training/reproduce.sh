#!/usr/bin/env bash
# From artwork to assets/: the picture set, the judge, and every stage of the bundled base, on one machine with GPUs.
#   training/reproduce.sh [STAGE ...]        stages: data judge vae clip read words base pack adapters zoo encoder shelf (all, in this order)
# GPUS (default: all) processes work together. Each stage goes on from what lies in OUT (default ~/.cache/lora-compose/base).
# Run it from the repository's root.
set -euo pipefail
HOLD=${XDG_CACHE_HOME:-$HOME/.cache}/lora-compose
OUT=${OUT:-$HOLD/base} ARCHIVE=${ARCHIVE:-$HOLD/data/pictures.zip} PHRASES=${PHRASES:-$HOLD/data/phrases.safetensors} ASSETS=${ASSETS:-assets}
PYTHON=${PYTHON:-.venv/bin/python} GPUS=${GPUS:-$(nvidia-smi -L | wc -l)} PER_GPU=${PER_GPU:-3}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
mkdir -p "$OUT"

stage() { # one process per GPU
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" -m compose.training.base \
    --archive "$ARCHIVE" --phrases "$PHRASES" --out "$OUT" --stage "$@"
}

for name in "${@:-data judge vae clip read words base pack adapters zoo encoder shelf}"; do
  for one in $name; do
    case $one in
      data)
        "$PYTHON" -m compose.app.cli data build --out "$ARCHIVE" --phrases "$PHRASES"
        "$PYTHON" -m compose.training.base --stage tokenizer --phrases "$PHRASES" --out "$OUT" ;;
      judge) "$PYTHON" -m benchmarks.judge.train --archive "$ARCHIVE" --seconds "${JUDGE_SECONDS:-430}" ;;
      vae) stage vae --seconds "${VAE_SECONDS:-430}" ;;
      clip) stage clip --seconds "${CLIP_SECONDS:-170}" ;;
      read) stage read --seconds "${READ_SECONDS:-120}" ;;
      words) stage words --seconds "${WORDS_SECONDS:-120}" ;;
      base) stage base --batch "${BATCH:-512}" --edit-batch "${EDIT_BATCH:-320}" --cache "${CACHE:-100000}" --edits "${EDITS:-30000}" \
        --seconds "${BASE_SECONDS:-1200}" --pause "${PAUSE:-100000}" --distill-seconds "${DISTILL_SECONDS:-80}" ;;
      pack) "$PYTHON" -m compose.training.base --stage pack --out "$OUT" && mkdir -p "$ASSETS" && cp -r "$OUT"/assets/* "$ASSETS"/ ;;
      adapters)
        for ((i = 0; i < GPUS * PER_GPU; i++)); do # so small a model leaves most of a GPU free
          CUDA_VISIBLE_DEVICES=$((i % GPUS)) "$PYTHON" -m compose.training.starter --archive "$ARCHIVE" --part "$i/$((GPUS * PER_GPU))" --base "$ASSETS/compose-mini" --out "$ASSETS/adapters" &
        done
        wait
        "$PYTHON" -m compose.training.starter_previews --base "$ASSETS/compose-mini" --adapters "$ASSETS/adapters" ;;
      zoo)
        for ((i = 0; i < GPUS; i++)); do
          CUDA_VISIBLE_DEVICES=$i "$PYTHON" -m benchmarks.zoo --archive "$ARCHIVE" --part "$i/$GPUS" --base "$ASSETS/compose-mini" --out "$OUT/zoo" &
        done
        wait ;;
      encoder) "$PYTHON" -m benchmarks.retrieval_weights --zoo "$OUT/zoo" --archive "$ARCHIVE" --clip "$ASSETS/clip" --base "$ASSETS/compose-mini" --save "$ASSETS/encoder.safetensors" ;;
      shelf) "$PYTHON" -m compose.training.shelf --clip "$ASSETS/clip" --base "$ASSETS/compose-mini" --adapters "$ASSETS/adapters" ;;
      *) echo "unknown stage $one" >&2; exit 2 ;;
    esac
  done
done
