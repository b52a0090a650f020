"""PEFT's half of bench_peft.py: answers its requests on standard input.

    PYTHON_WITH_PEFT scripts/bench/peft/peft_worker.py PROBLEM.json

As PEFT's users have it: PromptTuningConfig or LoraConfig on AutoModelForSeq2SeqLM, rows padded to
the longest of the batch, torch.optim.AdamW on what requires a gradient, gradients clipped to norm
1, answers by ``generate``. Without dropout the model is in evaluation mode, whose training step is
the same.
"""

import contextlib
import json
import os
import sys
import time
from typing import Any

try:
    import peft
    import torch
    import transformers
    from bench_tools import DROPOUT, LABELS, MEMBERS, RANK, Start, padded, resident, serve
except ImportError as error:
    print(json.dumps({"missing": error.name}), flush=True)
    sys.exit(2)

Job = dict[str, Any]
DTYPES = {
    "float32": torch.float32,
    "autocast": torch.float32,
    "bfloat16": torch.bfloat16,
}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def there(array) -> Any:
    """A NumPy array on the device."""
    return torch.from_numpy(array).to(DEVICE)


def inputs_of(rows) -> dict[str, Any]:
    """Ids and mask, padded to the longest row."""
    ids = padded([row["inputs"] for row in rows], 0)
    mask = padded([[1] * len(row["inputs"]) for row in rows], 0)
    return {"input_ids": there(ids), "attention_mask": there(mask)}


def labels_of(rows) -> Any:
    return there(padded([row["targets"] for row in rows], -100))


def prepare() -> None:
    """All cores, and what torch does once."""
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.zeros(3)


def versions() -> dict[str, Any]:
    found = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    return {"versions": found, "threads": torch.get_num_threads()}


def tuned(base: Any, given: Start) -> Any:
    """The model with a prompt, or with LoRAs of which the one named "default" is trained."""
    if given.method == "lora":
        config = peft.LoraConfig(
            task_type="SEQ_2_SEQ_LM", r=RANK, lora_alpha=RANK, target_modules=["q", "v"],
            lora_dropout=0.0,
        )  # fmt: skip
        model = peft.get_peft_model(base, config)
        for number in range(1, MEMBERS):
            model.add_adapter(f"lora{number}", config)
        return model
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=len(given.start))
    return peft.get_peft_model(base, config)


class Peer:
    """Runs jobs; a loaded model is kept for all that share its dtype and attention."""

    def __init__(self, problem: str):
        prepare()
        self.problem = problem
        self.given: Start | None = None
        self.models: dict[tuple[Any, str | None], Any] = {}
        self.compiled: dict[int, Any] = {}  # by the model's id

    def facts(self) -> dict[str, Any]:
        if DEVICE == "cpu":
            return versions()
        return versions() | {"devices": [torch.cuda.get_device_name()], "bare": 0}

    def start(self) -> Start:
        self.given = self.given or Start.read(self.problem)
        return self.given

    def model(self, job: Job):
        """The model with its prompt at the start."""
        key, given = (DTYPES[job["dtype"]], job["attention"]), self.start()
        if key not in self.models:
            chosen = {"attn_implementation": job["attention"]} if job["attention"] else {}
            base = transformers.AutoModelForSeq2SeqLM.from_pretrained(
                given.weights, dtype=key[0], dropout_rate=DROPOUT, **chosen
            )
            tied = base.lm_head.weight.data_ptr() == base.shared.weight.data_ptr()
            if tied or base.config.scale_decoder_outputs:
                raise RuntimeError("T5 1.1 has a head of its own and scales no output")
            self.models[key] = tuned(base, given).to(DEVICE)
        model = self.models[key]
        if given.method == "lora":
            model.set_adapter("default")
            with torch.no_grad():  # the product is 0 again
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        weight.zero_()
            return model
        prompt = model.prompt_encoder["default"].embedding.weight
        with torch.no_grad():  # it has twice as many rows; the second half is never looked at
            prompt[: len(given.start)] = model.word_embeddings.weight[given.start]
        return model

    def autocast(self, job: Job):
        if job["dtype"] != "autocast":
            return contextlib.nullcontext()
        return torch.autocast(DEVICE, dtype=torch.bfloat16)

    def train(self, job: Job, steps: int | None = None) -> dict[str, Any]:
        """Every batch once, from the same start: seconds, loss and shapes of each step."""
        model, given, size = self.model(job), self.start(), str(job["batch_size"])
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=given.learning_rate, weight_decay=0.0)
        model.train(job["dropout"] > 0)
        forward = model
        if job["compiled"]:  # static shapes: each that comes is compiled, and none is slower for it
            forward = self.compiled.setdefault(id(model), torch.compile(model, dynamic=False))
        found: dict[str, Any] = {"seconds": [], "losses": [], "shapes": []}
        for rows, split in list(zip(given.batches[size], given.splits[size], strict=True))[:steps]:
            parts = split if job["micro"] else [list(range(len(rows)))]
            tokens = sum(len(row["targets"]) for row in rows)
            total, shapes, began = 0.0, [], time.perf_counter()
            for numbers in parts:
                chosen = [rows[i] for i in numbers]
                inputs, labels = inputs_of(chosen), labels_of(chosen)
                with self.autocast(job):
                    loss = forward(**inputs, labels=labels).loss
                if len(parts) > 1:  # the mean over the tokens of the whole batch
                    loss = loss * (sum(len(row["targets"]) for row in chosen) / tokens)
                loss.backward()
                total += loss.item()
                count, width = inputs["input_ids"].shape
                shapes.append([count, width + len(given.start)])
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            found["seconds"].append(time.perf_counter() - began)
            found["losses"].append(total)
            found["shapes"].append(shapes)
        counts = sorted(str(p.dtype) for p in trainable)
        return found | {"trained": counts, "attention": model.config._attn_implementation}

    def answer(self, job: Job) -> dict[str, Any]:
        """All questions once, in order or sorted by length: seconds and what was written."""
        model, questions = self.model(job), self.start().questions
        model.eval()
        order = list(range(len(questions)))
        if job["members"] > 1:
            return self._answer_in_turn(job, model, questions)
        began = time.perf_counter()
        if job["sorted"]:
            order.sort(key=lambda i: -len(questions[i]["inputs"]))
        answers: list[Any] = [None] * len(order)
        longest = max(map(len, LABELS.values()))
        for first in range(0, len(order), job["batch_size"]):
            numbers = order[first : first + job["batch_size"]]
            with self.autocast(job), torch.no_grad():
                written = model.generate(
                    **inputs_of([questions[i] for i in numbers]),
                    max_new_tokens=longest, do_sample=False,
                )  # fmt: skip
            for number, ids in zip(numbers, written.tolist(), strict=True):
                answers[number] = ids
        return {"seconds": [time.perf_counter() - began], "answers": answers}

    def _answer_in_turn(self, job: Job, model: Any, questions: Any) -> dict[str, Any]:
        """Question i by LoRA i modulo their number: in the same batches, or apart."""
        names = ["default", *(f"lora{number}" for number in range(1, job["members"]))]
        turns = [names[i % len(names)] for i in range(len(questions))]
        longest, size = max(map(len, LABELS.values())), job["batch_size"]
        answers: list[Any] = [None] * len(questions)
        began = time.perf_counter()
        for first in range(0, len(questions), size):
            batch = list(range(first, min(first + size, len(questions))))
            parts = [batch]
            if job["apart"]:
                parts = [[i for i in batch if turns[i] == name] for name in names]
            for name, numbers in zip(names, parts, strict=False):
                chosen = {} if job["apart"] else {"adapter_names": [turns[i] for i in numbers]}
                if job["apart"]:
                    model.set_adapter(name)
                with self.autocast(job), torch.no_grad():
                    written = model.generate(
                        **inputs_of([questions[i] for i in numbers]), **chosen,
                        max_new_tokens=longest, do_sample=False,
                    )  # fmt: skip
                for number, ids in zip(numbers, written.tolist(), strict=True):
                    answers[number] = ids
        return {"seconds": [time.perf_counter() - began], "answers": answers}

    def peak(self) -> dict[str, int]:
        """Bytes: of the GPU where there is one, else of the process."""
        if DEVICE == "cuda":
            return {"peak": torch.cuda.max_memory_allocated()}
        return {"peak": resident("VmHWM")}


if __name__ == "__main__":
    serve(lambda: Peer(sys.argv[1]))
