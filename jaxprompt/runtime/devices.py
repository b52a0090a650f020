"""Processes and devices of a command, which must be chosen before JAX is used."""

import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from jaxprompt.config.errors import UserError, shown
from jaxprompt.config.paths import is_count
from jaxprompt.config.schema import MeshConfig

Device = Any  # a jax.Device, which type checkers see as a variable

# seconds in which all processes must have come
START_TIMEOUT = "JAXPROMPT_START_TIMEOUT"
# set to 1 where JAX finds the other processes by itself and none of the variables below tells of
# them, as on the workers of a TPU pod
SEVERAL = "JAXPROMPT_DISTRIBUTED"
# seconds without a sign of life after which a process counts as dead, and ends the others
SILENCE = 30
# devices that a CPU is given at most
MOST = 256
_COUNTS = ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def start(rows: Sequence[int] = (), mesh: MeshConfig = MeshConfig()) -> None:
    """Join the other processes, if there are any, else give a CPU a device for each core.

    rows: batch sizes that the devices must divide. Call it before anything asks JAX for a device.
    Where the processes do not come together in time, this one ends with a sentence and exit code 2.
    Raises UserError where the devices that are asked for are not there.
    """
    if several_processes(os.environ):
        join(os.environ)
    else:
        make_virtual_devices(rows, mesh)
    available()


def available() -> list[Device]:
    """All devices. Raises UserError where there is none of the platform in JAX_PLATFORMS."""
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:  # by platform
        asked = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        problem = " ".join(str(error).split())[:200]
        raise UserError(
            f"JAX_PLATFORMS is {asked!r}, and JAX finds no such device here"
            f"{f' ({problem})' if problem else ''}; see that the device works and install JAX for "
            "it (pip install 'jax[cuda13]' or 'jax[tpu]'), or unset JAX_PLATFORMS to take what "
            "there is."
        ) from None


def describe() -> str:
    """The devices of all processes in words, such as ``8 x NVIDIA H100``."""
    counts = Counter(device.device_kind for device in jax.devices())
    text = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
    several = jax.process_count()
    return f"{text} of {several} processes" if several > 1 else text


def several_processes(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one of several processes of a run.

    Understood are explicit addresses (``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES``,
    ``JAX_PROCESS_ID``), Slurm (``srun``), Open MPI, and the workers of a TPU slice on GKE.
    """
    counts = [environment[name] for name in _COUNTS if environment.get(name)]
    wrong = [count for count in counts if not is_count(count)]
    if wrong:
        raise UserError(f"The number of processes is {shown(wrong[0])}; set it to a whole number.")
    if counts:
        return any(int(count) > 1 for count in counts)
    workers = environment.get("TPU_WORKER_HOSTNAMES", "")
    return environment.get(SEVERAL) == "1" or "," in workers


def join(environment: Mapping[str, str]) -> None:
    """Start JAX's distributed runtime.

    JAX finds the other processes by itself where no variable names them. Where they do not come in
    time, this process ends with a sentence and exit code 2.

    Raises:
        UserError: A variable is missing, or is no whole number.
    """
    explicit = "JAX_NUM_PROCESSES" in environment
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if explicit and not environment.get(name)]
    if missing:
        raise UserError(f"{missing[0]} is not set; several processes need {', '.join(names)}.")
    addresses, seconds = {}, environment.get(START_TIMEOUT, "300")
    numbers = [environment[name] for name in names[1:]] if explicit else []
    for text in (*numbers, seconds):
        if not is_count(text):
            raise UserError(
                f"{', '.join((*names[1:], START_TIMEOUT))} are whole numbers, and one is "
                f"{shown(text)}."
            )
    if explicit:
        addresses = {
            "coordinator_address": environment[names[0]],
            "num_processes": int(numbers[0]),
            "process_id": int(numbers[1]),
        }
    # two programs that run on CPUs at the same time would take each other's messages
    jax.config.update("jax_cpu_enable_async_dispatch", False)

    def give_up(problem: str = "not all of them have come") -> None:
        print(
            f"error: The processes of this run did not come together in {seconds} s ({problem}); "
            "see that all were started, with the same number of processes and an address that "
            f"each can reach; {START_TIMEOUT} gives them longer.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(2)

    # where one is missing, JAX's runtime would abort the process with a stack trace
    alarm = threading.Timer(int(seconds), give_up)
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            **addresses,
            initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
        )
    except (RuntimeError, ValueError) as error:
        give_up(" ".join(str(error).split())[:300])
    alarm.cancel()


def cores_here(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The number of cores that this process may use: those it is bound to, or its quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bound = bound or 1
    try:
        allowed, period = quota.read_text().split()
        return max(1, min(bound, math.ceil(int(allowed) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return bound


def oversubscription_warning(devices: Sequence[Device], cores: int | None = None) -> str | None:
    """A warning where a CPU has more devices than cores, so that the devices take turns."""
    cores = cores or cores_here()
    if jax.process_count() > 1 or len(devices) <= cores or devices[0].platform != "cpu":
        return None
    return (
        f"the mesh has {len(devices)} devices on {cores} core(s), which take turns: leave mesh out "
        "for one device on each core, which is faster"
    )


def make_virtual_devices(rows: Sequence[int], mesh: MeshConfig, cores: int | None = None) -> None:
    """Give a CPU a device for each core, or what the mesh asks for, unless their number is set.

    Each core then computes rows of its own, which is faster than if all cores share each product.
    There are fewer devices where so many would not divide the rows of a batch.
    """
    settled = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if settled or jax.config.jax_num_cpu_devices >= 0:  # pyright: ignore[reportAttributeAccessIssue]
        return
    cores = cores or cores_here()
    # make_mesh refuses other numbers of devices
    fixed = math.prod(n for n in mesh.model_dump().values() if 0 < n <= MOST)
    if -1 in mesh.model_dump().values():
        shared = math.gcd(*rows)
        taken = math.prod(n for n in (mesh.data, mesh.fsdp) if 0 < n <= MOST)
        free = range(max(cores // fixed, 1), 0, -1)
        count = fixed * next((n for n in free if shared % (n * taken) == 0), 1)
    else:
        count = min(fixed, MOST)
    with suppress(RuntimeError):  # JAX is already in use: it stays as it is
        jax.config.update("jax_num_cpu_devices", count)
        if 1 < count == cores:  # no core is left to help another one
            flags = os.environ.get("XLA_FLAGS", "")
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
