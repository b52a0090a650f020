"""Four virtual CPU devices, and the tiny models that the tests share."""

import gc
import getpass
import itertools
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

# tiny models: most of the time of a test is the compiler's, which need not optimize
flags = ["--xla_force_host_platform_device_count=4", "--xla_backend_optimization_level=0"]
if version("jaxlib").startswith("0.10."):
    # its newer emitters take three times as long to compile; later versions have no others
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# compiled code is shared by the workers, the commands that tests start, and the next run
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/jaxprompt-tests-{getpass.getuser()}"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402

# calls of the package are checked against its annotations, with the shapes of arrays
CHECK_TYPES = os.environ.get("JAXPROMPT_CHECK_TYPES", "0") == "1"
if CHECK_TYPES:  # before the package is imported
    import jaxtyping

    # as for a static checker, an int is a float too
    jaxtyping.install_import_hook(
        "jaxprompt", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    )

GROUPS = ("unit", "parity", "runs", "processes")
LONG = {
    line
    for line in Path(__file__).with_name("long.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
ENDED_TESTS = itertools.count(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m unit`, or another group alone, files of other groups are not even imported."""
    others = {*GROUPS} - {config.option.markexpr}
    if len(others) < len(GROUPS) and collection_path.parent == Path(__file__).parent:
        return collection_path.name in others or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test has the marker of the folder of tests/ that it lies in; those of long.txt are long."""
    here = Path(__file__).parent
    names = {item.nodeid for item in items}
    files = {name.partition("::")[0] for name in names}
    gone = sorted(name for name in LONG - names if name.partition("::")[0] in files)
    if gone and not any("::" in argument for argument in config.args):  # files, and not tests
        raise pytest.UsageError(f"tests/long.txt names what is no test: {gone[0]}")
    for item in items:
        group = item.path.relative_to(here).parts[0]
        if group not in GROUPS:
            raise pytest.UsageError(f"{item.path}: move it to one of tests/{{{','.join(GROUPS)}}}")
        item.add_marker(group)
        if item.nodeid in LONG:
            item.add_marker("long")


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check annotations, but not in a test that passes what they forbid."""
    if CHECK_TYPES:
        forbidden = item.get_closest_marker("no_type_check") is not None
        jaxtyping.config.update("jaxtyping_disable", forbidden)


@pytest.fixture(scope="session")
def tiny():
    """A random T5 1.1 with logits of order 1: (model, parameters)."""
    # imported here: the process that only hands out tests needs no jax
    import jax

    from jaxprompt.models.t5 import t5

    config = t5.T5Config(
        vocab_size=61, d_model=16, num_heads=3, head_dim=4, d_ff=24,
        num_encoder_layers=3, num_decoder_layers=2,
    )  # fmt: skip
    return t5.T5Model(config), jax.jit(t5.init_params, static_argnums=0)(config, jax.random.key(0))


@pytest.fixture(autouse=True)
def memory():
    """Programs compiled by earlier tests are dropped before Linux's limit of maps is reached.

    Each program takes dozens, a process may have 65,530, and beyond them LLVM's loader crashes.
    What is kept is not searched for garbage again: that took longer with each test.
    """
    yield
    if next(ENDED_TESTS) % 8:  # the list is long to read, and no test adds thousands
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
    gc.collect(1)
    gc.freeze()
