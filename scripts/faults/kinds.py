"""The kinds of inputs that the fuzzer makes: each writes one and returns how to open it."""

import csv
import functools
import json
import pickle
import random
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from mutations import ODD_VALUES, damage_bytes, damage_tree, odd_value, tree_bytes

ROOT = Path(__file__).resolve().parents[2]
MARK = "executed"  # a file that only code inside an input writes, in the working directory
Made = tuple[str, Callable[[], Any]]  # what was made, in words, and how it is opened


class Lost(AssertionError):
    """Something was read that was not written, or something of the user's is gone."""


@functools.cache
def prepared() -> Path:
    """Good files to damage: a tiny backbone, a GGUF file, a T5X checkpoint, a prompt, a run."""
    import helpers
    import helpers_gguf
    import test_t5x

    folder = Path(tempfile.mkdtemp(prefix="fuzz-good-"))
    helpers.make_backbone(folder / "backbone")
    (folder / "gguf").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        helpers_gguf.make_gguf(folder / "gguf" / "model.gguf")
    tensors, _ = test_t5x.golden_tensors("t5_1_1")
    test_t5x.write_t5x(folder / "t5x", test_t5x.shared_bias(test_t5x.t5x_names(tensors)))
    config = helpers.run_config(
        folder / "backbone",
        folder / "data",
        train={"steps": 4, "evaluate_every": 2, "checkpoint_every": 2},
    )
    from jaxprompt.training.loop import train

    train(config)
    return folder


def small_file(rng: random.Random, folder: Path) -> Path:
    """One of the files below a folder."""
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


# -- configs ---------------------------------------------------------------------------------------

_LINES = [
    "a: &a [x, x]", "b: &b [*a, *a]", "<<: {steps: 1}",
    "train: !!python/object/apply:os.system ['touch executed']", "seed: !!bool foo",
    "seed: !!float ''", "task: !!map [a]", "task: !!timestamp abc", "x: !!int {a: b}",
    "steps: 0x" + "F" * 5000, 'output: "a\\0b"', "output: ~nosuch/x",
    "task: {name: [1], template: '{a}'}", "? [a, b]\n: c", "- 1", "%YAML 9.9", "---", "...", "\t",
    "task: |\n  a", "'", "{", "}: ", "#", "*x",
]  # fmt: skip
_OVERRIDES = [
    "train.steps=1", "train.steps=#", "train.steps=", "=", "a=b", "task.template={text} # x",
    "task=rte", "train.steps=[1", "train.seed=!!bool foo", "prompt.population={seed: [1, 1]}",
    "task.labels=[a, b]", "text.0.train=x", "text.99999999999.train=x",
    "task.max_input_length=64", "output=~nosuch/y", "train=5", "train.steps.x=1", "mesh.data=0",
    "prompt.length=1e3", "\ud800=1", "output=\0",
]  # fmt: skip


def configs(rng: random.Random, folder: Path) -> Made:
    """A config of the repository with values, lines or bytes changed, and overrides."""
    source = rng.choice(sorted((ROOT / "configs").rglob("*.yaml")))
    text, path = source.read_text(), folder / "c.yaml"
    how = rng.choice(["tree", "tree", "lines", "bytes"])
    if how == "tree":
        tree = damage_tree(rng, yaml.safe_load(text))
        path.write_bytes(tree_bytes(tree))  # JSON is YAML
    elif how == "lines":
        lines = text.splitlines()
        for _ in range(rng.choice([1, 2, 4])):
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(["", "  "]) + rng.choice(_LINES))
        path.write_text("\n".join(lines), errors="surrogatepass")
    else:
        path.write_bytes(damage_bytes(rng, text.encode()))
    overrides = rng.sample(_OVERRIDES, rng.choice([0, 0, 1, 2]))

    def open_it() -> None:
        from jaxprompt.config.overrides import dump_yaml, load_config, read_config, read_yaml
        from jaxprompt.config.pretrain import PretrainConfig
        from jaxprompt.config.schema import RunConfig
        from jaxprompt.config.validation import parse
        from jaxprompt.data.tasks.registry import resolve_task
        from jaxprompt.training.datasets import tasks_of

        if source.parent.name == "pretrain":
            config, schema = parse(PretrainConfig, read_config(path, overrides)), PretrainConfig
        else:
            config, schema = load_config(path, overrides), RunConfig
            tasks_of(config.members())
            resolve_task(config.task)
        if parse(schema, read_yaml(dump_yaml(config), "dump")) != config:
            raise Lost("the config that was dumped is another one when read")

    return f"{source.name} with other {how}, overrides {overrides}", open_it


# -- rows ------------------------------------------------------------------------------------------

_TEXTS = [
    "plain text", "", " ", "two  blanks", " ends in a blank ", 'a "quoted" word', '"', '"open',
    "a,b", "a\tb", "a;b", "line\nbreak", "line\r\nbreak", "\r", "a\x85b", "a\u2028b", "a\x00b",
    "\ufeffa", "caf\u00e9", "cafe\u0301", "日本語", "🙂", "\ud800", "nan", "NaN", "null", "None",
    "NA", "N/A", "-", "1", "1.0", "01", "true", "=1+1", "</s>", "<pad>", "\uff1c/s\uff1e",
    "<\x01/s>", "<extra_id_0>", "{x}", "[prompt]", "#", "'", "\\", "\\n", "a" * 5000,
    "word " * 3000, "\u202eabc", "\u00ad", "\u00a0", "\u200b",
]  # fmt: skip


def rows(rng: random.Random, folder: Path) -> Made:
    """A file of rows with odd values: what is read is what was written, or it is refused."""
    kind = rng.choice(["jsonl", "jsonl", "csv", "tsv", "parquet"])
    path, count = folder / f"d.{kind}", rng.choice([1, 2, 5, 30])
    wild = kind in ("jsonl", "parquet") and rng.random() < 0.4
    extra = rng.choice(["extra", "", "text ", "Text", "label.1", "prediction", "日本", "a b"])

    def value() -> Any:
        return odd_value(rng) if wild and rng.random() < 0.3 else rng.choice(_TEXTS)

    written = [{"text": value(), "label": value(), extra: value()} for _ in range(count)]
    {"jsonl": _write_jsonl, "csv": _write_csv, "tsv": _write_csv, "parquet": _write_parquet}[kind](
        path, written
    )
    damaged = rng.random() < 0.35
    if damaged:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))

    def open_it() -> None:
        from jaxprompt.data.examples import tokenize
        from jaxprompt.data.sources import read_rows
        from jaxprompt.data.tasks.registry import resolve_task
        from jaxprompt.data.tokenizer import load_tokenizer
        from jaxprompt.data.virtual_tokens import VirtualTokens

        read = list(read_rows(None, str(path)))
        if not damaged:
            _same_rows(written, read)
        task = resolve_task({"name": "t", "template": "{text}", "max_input_length": 32})
        tokenizer = load_tokenizer(prepared() / "backbone")
        examples = tokenize(
            task, read, tokenizer, VirtualTokens(32, 2), need_targets=rng.random() < 0.5
        )
        if len(examples) != len(read):
            raise Lost(f"{len(read)} rows are {len(examples)} examples")
        if any(2 + 32 < len(e.inputs) or (e.inputs[2:] >= 32).any() for e in examples):
            raise Lost("a text has the id of a virtual token, or is longer than allowed")

    return f"{count} rows of {kind}{', damaged' if damaged else ''}", open_it


def _same_rows(written: list[dict], read: list[dict]) -> None:
    if len(read) != len(written):
        raise Lost(f"{len(written)} rows were written and {len(read)} read")
    for number, (was, now) in enumerate(zip(written, read, strict=True), 1):
        for key, value in was.items():
            if isinstance(value, float) and value != value and now.get(key) is not None:
                raise Lost(f"row {number}: a number that is none was read as {now[key]!r}")
            if isinstance(value, str) and now.get(key) != value and (value or now.get(key)):
                raise Lost(f"row {number}, {key!r}: {value[:60]!r} was read as {now.get(key)!r}")


def _write_jsonl(path: Path, written: list[dict]) -> None:
    path.write_bytes(b"".join(tree_bytes(row) + b"\n" for row in written))


def _write_csv(path: Path, written: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        separator = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(written[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(written)


def _write_parquet(path: Path, written: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from jaxprompt.config.errors import shown

    def column(values: list) -> Any:
        try:
            if any(tree_bytes(value).count(b"[") > 50 for value in values):
                raise ValueError("pyarrow crashes on lists thousands of levels deep")
            return pa.array(values)
        except Exception:  # values of several types
            return pa.array([shown(value).encode("utf-8", "replace") for value in values])

    for row in written:  # what parquet cannot hold is not the reader's matter
        for key, value in row.items():
            if isinstance(value, str):
                row[key] = value.encode("utf-8", "replace").decode()
    columns = {key: column([row[key] for row in written]) for key in written[0]}
    for key, values in columns.items():
        if pa.types.is_binary(values.type):
            for row in written:
                row[key] = None  # written as bytes: any refusal or text is right
    pq.write_table(pa.table(columns), path)


# -- weights ---------------------------------------------------------------------------------------

_GOLDENS = [
    "goldens/t5_1_1", "goldens/t5_1_0", "goldens/t5_lm_adapt", "goldens/umt5", "goldens/mt5",
    "goldens_causal/llama", "goldens_causal/qwen2", "goldens_causal/mistral",
]  # fmt: skip


class _Calls:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('executed').touch()",))


def weights(rng: random.Random, folder: Path) -> Made:
    """A checkpoint in one of the formats with a lying config, header, or bytes; or a trap."""
    model = folder / "m"
    what = rng.choice(["config", "config", "header", "header", "bytes", "gguf", "t5x", "trap"])
    if what == "gguf":
        shutil.copytree(prepared() / "gguf", model)
        path = model / "model.gguf"
        data = path.read_bytes()
        head = damage_bytes(rng, data[:6000]) if rng.random() < 0.8 else data[:6000]
        path.write_bytes(
            head + (data[6000:] if rng.random() < 0.8 else damage_bytes(rng, data[6000:]))
        )
        return "gguf", functools.partial(_load, path)
    if what == "t5x":
        shutil.copytree(prepared() / "t5x", model)
        path = small_file(rng, model)
        if path.name == ".zarray" and rng.random() < 0.7:
            path.write_bytes(tree_bytes(damage_tree(rng, json.loads(path.read_text()))))
        else:
            path.write_bytes(damage_bytes(rng, path.read_bytes()))
        return f"t5x, {path.relative_to(model)}", functools.partial(_load, model)
    source = ROOT / "tests" / "parity" / rng.choice(_GOLDENS)
    shutil.copytree(source, model)
    if what == "trap":
        return _trap(rng, model)
    if what == "config":
        path = model / "config.json"
        path.write_bytes(tree_bytes(damage_tree(rng, json.loads(path.read_text()))))
        return f"{source.name}, config.json", functools.partial(_load, model)
    files = [p for p in model.iterdir() if p.suffix in (".safetensors", ".bin", ".msgpack")]
    path = rng.choice(sorted(files))
    for other in files:
        if other != path:
            other.unlink()
    data = path.read_bytes()
    if what == "header" and path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        head = tree_bytes(damage_tree(rng, json.loads(data[8 : 8 + size])))
        path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + size :])
    else:
        path.write_bytes(damage_bytes(rng, data))
    return f"{source.name}, {what} of {path.name}", functools.partial(_load, model)


def _trap(rng: random.Random, model: Path) -> Made:
    """Files that run code when a careless program opens them."""
    for path in model.glob("*.safetensors"):
        path.unlink()
    kind = rng.choice(["zip", "legacy", "tokenizer", "npy"])
    payload = pickle.dumps({"shared.weight": _Calls()}, rng.choice([0, 1, 2, 4, 5]))
    if kind == "zip":
        with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", payload)
    elif kind == "legacy":
        (model / "pytorch_model.bin").write_bytes(payload)
    elif kind == "npy":
        np.save(model / "p.npy", np.array([_Calls()], object), allow_pickle=True)
        from jaxprompt.methods.artefact import load_prompt

        return "trap: npy", lambda: load_prompt(model / "p.npy")
    else:
        (model / "evil.py").write_text("open('executed', 'w')\nclass T: pass\n")
        for name in ("config.json", "tokenizer_config.json"):
            says = {
                "model_type": "nosuch",
                "tokenizer_class": "T",
                "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"], "AutoConfig": "evil.T"},
            }
            (model / name).write_text(json.dumps(says))
        (model / "tokenizer.json").write_text("{}")
        from jaxprompt.data.tokenizer import load_tokenizer

        return "trap: tokenizer", lambda: load_tokenizer(model)
    return f"trap: {kind}", functools.partial(_load, model)


def _load(path: Path) -> None:
    import jax

    from jaxprompt.models.checkpoints.load import load_backbone

    backbone = load_backbone(str(path))
    for leaf in jax.tree.leaves(backbone.params):
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            raise Lost("weights that are not numbers were loaded without a word")


# -- prompts ---------------------------------------------------------------------------------------


@functools.cache
def good_prompt() -> Path:
    """The artefact that the prepared run has tuned."""
    return prepared() / "data" / "run" / "prompt"


def prompts(rng: random.Random, folder: Path) -> Made:
    """An artefact, an adapter or an array with odd facts or bytes; or a folder to save into."""
    import jaxprompt as jp

    place, what = (
        folder / "p",
        rng.choice(["facts", "facts", "facts", "tensors", "peft", "npy", "save"]),
    )
    if what == "save":
        return _save_into(rng, folder)
    if what == "npy":
        place = folder / "p.npy"
        np.save(place, np.ones((3, 16), np.float32))
        place.write_bytes(damage_bytes(rng, place.read_bytes()))
    elif what == "peft":
        jp.save_peft(place, jp.load_prompt(good_prompt()))
        path = place / rng.choice(["adapter_config.json", "adapter_model.safetensors"])
        if path.suffix == ".json" and rng.random() < 0.8:
            path.write_bytes(tree_bytes(damage_tree(rng, json.loads(path.read_text()))))
        else:
            path.write_bytes(damage_bytes(rng, path.read_bytes()))
    else:
        shutil.copytree(good_prompt(), place)
        path = place / ("prompt.json" if what == "facts" else "prompt.safetensors")
        if what == "facts" and rng.random() < 0.8:
            path.write_bytes(tree_bytes(damage_tree(rng, json.loads(path.read_text()))))
        else:
            path.write_bytes(damage_bytes(rng, path.read_bytes()))

    def open_it() -> None:
        from jaxprompt import api

        prompt = jp.load_prompt(place)
        jp.save_prompt(folder / "again", prompt)
        if not np.array_equal(jp.load_prompt(folder / "again").vectors, prompt.vectors):
            raise Lost("a prompt that was saved has other vectors when it is read")
        session = api.open_session(prompt, str(prepared() / "backbone"))
        task = api.prompt_task(prompt, None)
        row = {name: "it was good" for name in ("text", "label")}
        answers = jp.predict(session, [row], task=task)
        json.dumps(answers, allow_nan=False)

    return what, open_it


def _save_into(rng: random.Random, folder: Path) -> Made:
    """Save a prompt into a folder that holds other things, or facts that JSON cannot spell."""
    import jaxprompt as jp

    place, mine = folder / "work", {}
    for name in rng.sample(
        ["thesis.tex", "sub/data", "prompt.json.bak", "checkpoints/1", ".hidden"], 3
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
        mine[place / name] = name
    if rng.random() < 0.3:
        shutil.copytree(good_prompt(), place, dirs_exist_ok=True)
    if rng.random() < 0.3:
        place.rename(folder / "real")
        place.symlink_to("real")
    facts = {rng.choice(["x", "metrics", "task", "backbone", "step"]): rng.choice(ODD_VALUES)}
    prompt = jp.load_prompt(good_prompt())._replace(metadata=facts)
    save = rng.choice([jp.save_prompt, jp.save_peft])

    def open_it() -> None:
        try:
            save(place, prompt)
        finally:
            for path, text in mine.items():
                if not path.is_file() or path.read_text() != text:
                    raise Lost(f"{path.relative_to(folder)} is gone") from None

    return f"{save.__name__} into a folder of other things", open_it


# -- checkpoints -----------------------------------------------------------------------------------


def checkpoints(rng: random.Random, folder: Path) -> Made:
    """A run whose files are damaged, opened as ``train`` opens it; some go on to the end."""
    from jaxprompt.config.overrides import read_yaml
    from jaxprompt.config.validation import parse

    run = folder / "run"
    shutil.copytree(prepared() / "data" / "run", run)
    path = small_file(rng, run)
    if rng.random() < 0.6:
        path = run / rng.choice(["config.yaml", "metrics.jsonl", "result.json"])
    values = read_yaml((run / "config.yaml").read_text(), "config")
    if path.name == "metrics.jsonl" and rng.random() < 0.7:
        lines = path.read_text().splitlines()
        lines.insert(
            rng.randrange(len(lines) + 1),
            rng.choice(
                [
                    "",
                    "{",
                    '{"loss": 1}',
                    "[1]",
                    "null",
                    '{"step": "a"}',
                    "[" * 100_000,
                    '{"step": NaN}',
                    "\x85",
                    "{} {}",
                ]
            ),
        )
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json" and rng.random() < 0.6:
        path.write_bytes(tree_bytes(damage_tree(rng, json.loads(path.read_text()))))
    else:
        path.write_bytes(damage_bytes(rng, path.read_bytes()))
    if rng.random() < 0.1:
        (run / "checkpoints" / rng.choice(["²", "-1", "01", "99", "x"])).mkdir(exist_ok=True)
    values |= {"output": str(run)}
    values["train"] |= {"steps": 6}
    whole = rng.random() < 0.06
    before = _good_rows(run)

    def open_it() -> None:
        from jaxprompt.config.schema import RunConfig
        from jaxprompt.training.loop import train

        if whole:
            result = train(parse(RunConfig, values))
            if result["steps"] != 6:
                raise Lost(f"the run ended at step {result['steps']}")
        else:
            _open_parts(parse(RunConfig, values), run)
        after = _good_rows(run)
        lost = [row for row in before if row not in after and json.loads(row)["step"] <= 4]
        if lost:
            raise Lost(f"metrics.jsonl has lost {len(lost)} of {len(before)} rows: {lost[0][:100]}")

    return f"{path.relative_to(run)}{', a whole run' if whole else ''}", open_it


def _open_parts(config: Any, run: Path) -> None:
    from jaxprompt.training.checkpoint import Checkpoints
    from jaxprompt.training.metric_log import MetricWriter
    from jaxprompt.training.run_dir import load_result, open_run

    load_result(config)
    with open_run(config):
        saved = Checkpoints(run / "checkpoints", 2)
        step = saved.latest_step()
        if step is not None:
            saved.progress()
            MetricWriter(run, 4).close()


def _good_rows(run: Path) -> list[str]:
    """The lines of metrics.jsonl that are a row with a step."""
    found = []
    for line in (run / "metrics.jsonl").read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                found.append(json.dumps(row))
        except (ValueError, RecursionError):
            continue
    return found


KINDS = {
    "configs": configs,
    "rows": rows,
    "weights": weights,
    "prompts": prompts,
    "checkpoints": checkpoints,
}
