"""Many synthetic prompts: copies of a real one whose vectors have a little noise.

    python scripts/bench/serve/prompts.py runs/quickstart/prompt --count 1000 --out runs/1000

The measurement makes those that it needs itself.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def name_of(number: int) -> str:
    return f"p{number:05d}"


def make_prompts(artefact: Path, out: Path, count: int, noise: float = 0.05, seed: int = 0) -> None:
    """Write ``count`` prompts into ``out``; those that are there already stay.

    Args:
        artefact: a tuned prompt.
        out: a directory for ``--library``.
        count: of prompts; number 0 is the artefact itself.
        noise: standard deviation of what is added, relative to that of the vectors.
        seed: of the noise.
    """
    tensors = load_file(artefact / "prompt.safetensors")
    facts = json.loads((artefact / "prompt.json").read_text())
    for number in range(count):
        folder = out / name_of(number)
        if (folder / "prompt.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((seed, number))
        scale = noise if number else 0.0
        noisy = {key: _noisy(value, scale, rng) for key, value in tensors.items()}
        save_file(noisy, folder / "prompt.safetensors")
        (folder / "prompt.json").write_text(json.dumps(facts))


def _noisy(values: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(size=values.shape) * values.std() * scale
    return (values + noise).astype(values.dtype)


def variant(artefact: Path, out: Path) -> Path:
    """A prompt that answers differently: the vectors in the opposite order, half as long."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tensors = load_file(artefact / "prompt.safetensors")
    changed = {key: np.ascontiguousarray(value[::-1] * 0.5) for key, value in tensors.items()}
    save_file(changed, out / "prompt.safetensors")
    shutil.copy(artefact / "prompt.json", out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    make_prompts(options.artefact, options.out, options.count)
