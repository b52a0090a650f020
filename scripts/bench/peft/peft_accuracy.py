"""PEFT's half of bench_time_to_accuracy.py: answers its requests on standard input.

    PYTHON_WITH_PEFT scripts/bench/peft/peft_accuracy.py PROBLEM.json

A prompt is tuned as PEFT's users do it: it starts as the words of a text, AdamW with a linear
decay, gradients clipped to norm 1, random batches padded to their longest row, and ``generate`` for
the validation rows in their order.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from bench_tools import serve
from peft_worker import inputs_of, labels_of, peft, prepare, torch, transformers, versions


class Tuning:
    """One run a process."""

    def __init__(self, problem: str):
        prepare()
        self.given = json.loads(Path(problem).read_text())

    def facts(self) -> dict[str, Any]:
        return versions()

    def tune(self, rate: float, seed: int) -> dict[str, Any]:
        """Accuracy of every evaluation, and seconds since the start and of evaluation until it."""
        began, evaluating, given = time.perf_counter(), 0.0, self.given
        torch.manual_seed(seed)
        base = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            given["weights"], dtype=torch.float32, dropout_rate=given["peft_dropout"]
        )
        config = peft.PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=given["length"],
            prompt_tuning_init="TEXT", prompt_tuning_init_text=given["start"],
            tokenizer_name_or_path=given["weights"],
        )  # fmt: skip
        model = peft.get_peft_model(base, config)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=rate)
        steps, rows, size = given["steps"], given["train"], given["batch_size"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        events, order = [], []
        for step in range(1, steps + 1):
            model.train()
            if len(order) < size:  # the next epoch; the ragged end of the last one is dropped
                order = torch.randperm(len(rows)).tolist()
            chosen, order = [rows[i] for i in order[:size]], order[size:]
            loss = model(**inputs_of(chosen), labels=labels_of(chosen)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % given["evaluate_every"] and step < steps:
                continue
            paused = time.perf_counter()
            accuracy = self.accuracy(model)
            now = time.perf_counter()
            evaluating += now - paused
            events.append({"step": step, "accuracy": accuracy, "seconds": now - began,
                           "evaluating": evaluating})  # fmt: skip
            told = f"PEFT, rate {rate:g}, step {step}: loss {loss.item():.3f}, {accuracy:.3f}"
            print(told, file=sys.stderr)
        return {"events": events}

    def accuracy(self, model) -> float:
        """Share of validation rows whose target is what is written."""
        model.eval()
        rows, size, right = self.given["validation"], self.given["batch_size"], 0
        longest = max(len(row["targets"]) for row in rows)
        for first in range(0, len(rows), size):
            chosen = rows[first : first + size]
            with torch.no_grad():
                written = model.generate(
                    **inputs_of(chosen), max_new_tokens=longest, do_sample=False
                )
            for row, ids in zip(chosen, written.tolist(), strict=True):  # the first id is the start
                right += ids[1 : 1 + len(row["targets"])] == row["targets"]
        return right / len(rows)


if __name__ == "__main__":
    serve(lambda: Tuning(sys.argv[1]))
