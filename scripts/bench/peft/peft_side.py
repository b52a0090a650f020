"""PEFT's half of compare_peft.py: the same weights, batches, start and optimizer, in PyTorch.

    PYTHON_WITH_PEFT scripts/bench/peft/peft_side.py PROBLEM.npz WEIGHTS_FOLDER OUT_FOLDER

PROBLEM.npz is what compare_peft.py has written; WEIGHTS_FOLDER is a Hugging Face directory. Rows
are padded to the longest of a batch, as PEFT's users do. Writes the adapter and times.json.
"""

import json
import os
import sys
import time

import numpy as np
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model


def main(problem: str, weights: str, out: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data = np.load(problem, allow_pickle=False)
    settings = json.loads(str(data["settings"]))
    base = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    start = data["start"]
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(start))
    model = get_peft_model(base, config)
    prompt = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        prompt.copy_(torch.from_numpy(start))
    optimizer = torch.optim.AdamW([prompt], lr=settings["learning_rate"], weight_decay=0.0)
    steps = settings["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    times, losses = [], []
    for step in range(steps):
        began = time.perf_counter()
        inputs, targets = data[f"inputs_{step}"], data[f"targets_{step}"]  # padded with -1
        rows = [(i[i >= 0], t[t >= 0]) for i, t in zip(inputs, targets, strict=True)]
        width = max(len(i) + len(t) for i, t in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for n, (i, t) in enumerate(rows):
            whole = np.concatenate([i, t])
            ids[n, : len(whole)] = torch.from_numpy(whole)
            labels[n, len(i) : len(whole)] = torch.from_numpy(t)
            mask[n, : len(whole)] = 1
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([prompt], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter() - began)
        print(f"peft step {step + 1}/{steps}: loss {losses[-1]:.4f}", file=sys.stderr)
    model.save_pretrained(out)
    with open(f"{out}/times.json", "w") as file:
        json.dump({"times": times, "losses": losses}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
