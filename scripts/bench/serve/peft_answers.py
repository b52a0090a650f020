"""PEFT's side of beside_peft.py: prompts of a T5 that take turns, since a batch has one of them.

    PYTHON_WITH_PEFT scripts/bench/serve/peft_answers.py PROBLEM.json

Reads lines {"names": [one for each row], "how": "rank" | "generate"}, prints lines with seconds.
"""

import json
import os
import sys
import time

import torch
import transformers
from peft import PeftModel


def padded(rows: list[list[int]], fill: int = 0) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def rank(model: PeftModel, inputs: list[list[int]], labels: list[list[int]]) -> list[list[float]]:
    """Log-likelihoods of all labels of each row, rows of similar length together."""
    repeated = [row for row in inputs for _ in labels]
    ids, targets = padded(repeated), padded(labels * len(inputs), -100)
    mask = padded([[1] * len(row) for row in repeated])
    logits = model(input_ids=ids, attention_mask=mask, labels=targets).logits
    log_p = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return ((log_p * (targets >= 0)).sum(-1)).view(len(inputs), len(labels)).tolist()


def generate(model: PeftModel, inputs: list[list[int]], labels: list[list[int]]) -> list:
    """The greedy answer of each row."""
    mask = padded([[1] * len(row) for row in inputs])
    longest = max(map(len, labels))
    return model.generate(
        input_ids=padded(inputs), attention_mask=mask, max_new_tokens=longest, do_sample=False
    ).tolist()


def answer(model: PeftModel, problem: dict, question: dict) -> dict:
    """One adapter after another, each with its rows."""
    how = {"rank": rank, "generate": generate}[question["how"]]
    found: list = [None] * len(problem["inputs"])
    begin = time.perf_counter()
    for name in sorted(set(question["names"])):
        model.set_adapter(name)
        places = [at for at, other in enumerate(question["names"]) if other == name]
        answers = how(model, [problem["inputs"][at] for at in places], problem["labels"])
        for at, each in zip(places, answers, strict=True):
            found[at] = each
    return {"seconds": time.perf_counter() - begin, "scores": found}


def main(path: str) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with open(path) as file:
        problem = json.load(file)
    folder, names = problem["folder"], problem["names"]
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        f"{folder}/backbone", dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, f"{folder}/adapters/{names[0]}", names[0])
    for name in names[1:]:
        model.load_adapter(f"{folder}/adapters/{name}", name)
    model.eval()
    print(json.dumps({"ready": True}), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps(answer(model, problem, json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
