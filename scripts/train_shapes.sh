#!/usr/bin/env bash
# Train everything in checkpoints/shapes from nothing, stage by stage. A finished stage is kept: run it again to go on.
#   scripts/train_shapes.sh            all stages
#   rm -r logs/shapes/teacher          ... and run again to repeat one
set -euo pipefail
cd "$(dirname "$0")/.."
# Two threads that wait actively, each on a core of its own: 20 times faster than the default on shared machines.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(getconf _NPROCESSORS_ONLN)}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-ACTIVE}"
export OMP_PROC_BIND="${OMP_PROC_BIND:-true}"

stage() { # name: train configs/shapes/NAME.yaml unless its model is there
  local log="logs/shapes/$1"
  if [ -d "$log/model" ]; then
    echo "$1: done already ($log/model)"
  else
    echo "$1: training into $log, from where it stopped"
    python train.py --config_path "configs/shapes/$1.yaml" --logdir "$log"
  fi
}

publish() { # stage part name: copy a trained part to checkpoints/shapes/NAME
  mkdir -p checkpoints/shapes
  rm -rf "checkpoints/shapes/$3"
  cp -r "logs/shapes/$1/model/$2" "checkpoints/shapes/$3"
}

stage codec
publish codec codec codec
stage teacher_short
stage teacher
publish teacher text_encoder text_encoder
stage teacher_long
publish teacher_long generator teacher
stage teacher_forcing
publish teacher_forcing generator student
stage self_forcing_dmd
publish self_forcing_dmd generator generator
stage codec_final
publish codec_final codec codec
python scripts/evaluate.py --checkpoint checkpoints/shapes/generator --output_folder logs/shapes/evaluation
