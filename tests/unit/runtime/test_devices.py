"""Processes and devices, settled before JAX is used."""

from types import SimpleNamespace

import jax
import pytest

from jaxprompt.config.errors import UserError
from jaxprompt.config.schema import MeshConfig
from jaxprompt.runtime import devices, parallel


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, False),
        ({"JAX_NUM_PROCESSES": "2"}, True),
        ({"SLURM_NTASKS": "8"}, False),  # of an allocation: without srun there is one process
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"JAXPROMPT_DISTRIBUTED": "1"}, True),
    ],
)
def test_the_environment_says_whether_there_are_others(environment, several):
    assert devices.several_processes(environment) == several


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS is not set; several processes need"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_PROCESS_ID is not"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "x"},
         "are whole numbers, and one is 'x'"),
    ],
)  # fmt: skip
def test_what_is_missing_is_told(environment, words):
    with pytest.raises(UserError, match=words):
        devices.join(environment)
    for count in ("two", "²", "١٢", "-1", "1" * 5000):  # not all digits are numbers to Python
        with pytest.raises(UserError, match=f"number of processes is '{count[:9]}"):
            devices.several_processes({"JAX_NUM_PROCESSES": count})


@pytest.mark.parametrize(
    "rows, mesh, cores, count, alone",
    [
        ([32, 0], {}, 2, 2, True),
        ([32, 0], {}, 12, 8, False),  # the largest number of devices that divides 32
        ([32, 4], {}, 12, 4, False),
        ([5], {}, 4, 1, False),
        ([], {}, 6, 6, True),
        ([], {}, 1, 1, False),
        ([32], {"data": 4}, 2, 4, False),
        ([32], {"tensor": 2}, 4, 4, True),
        ([12], {"fsdp": 2}, 8, 6, False),  # 12 rows go over 3 x 2 devices, and not over 4 x 2
        ([32], {"data": 2, "fsdp": -1}, 6, 4, False),
        ([2], {"data": 2, "fsdp": -1}, 6, 2, False),  # 2 rows go over no more than 2
        ([32], {"data": 10**6}, 2, 1, False),  # refused later, and memory is not filled before
    ],
)
def test_a_cpu_gets_a_device_for_each_core(monkeypatch, rows, mesh, cores, count, alone):
    told = {}

    class Config:
        jax_num_cpu_devices = -1
        update = staticmethod(told.__setitem__)

    monkeypatch.setenv("XLA_FLAGS", "--a")
    monkeypatch.setattr(devices.jax, "config", Config)
    devices.make_virtual_devices(rows, MeshConfig(**mesh), cores)
    assert told == {"jax_num_cpu_devices": count}
    assert devices.os.environ["XLA_FLAGS"] == (
        "--a --xla_cpu_multi_thread_eigen=false" if alone else "--a"
    )


def test_what_the_user_has_settled_stays(monkeypatch):
    class Config:
        jax_num_cpu_devices = 3

        @staticmethod
        def update(name, value):
            raise AssertionError(name)

    monkeypatch.setattr(devices.jax, "config", Config)
    monkeypatch.delenv("XLA_FLAGS")
    devices.make_virtual_devices([32], MeshConfig())
    Config.jax_num_cpu_devices = -1
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    devices.make_virtual_devices([32], MeshConfig())


def test_the_quota_of_a_container_counts(tmp_path):
    bound, file = devices.cores_here(tmp_path / "none"), tmp_path / "cpu.max"
    assert bound >= 1
    for text, count in (("max 100000", bound), ("50000 100000", 1), ("100000 100000", 1),
                        ("99900000 100000", bound), ("", bound)):  # fmt: skip
        file.write_text(text)
        assert devices.cores_here(file) == count


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("Unable to initialize\nbackend 'rocm': " + "x" * 9999)]
)
def test_a_device_that_is_asked_for_and_not_there_is_a_sentence(monkeypatch, error):
    def none_there():
        raise error

    monkeypatch.setattr(jax, "devices", none_there)
    for ask in (devices.available, parallel.make_mesh):
        with pytest.raises(UserError, match="no such device here.*or unset JAX_PLATFORMS") as at:
            ask()
        assert "\n" not in str(at.value) and len(str(at.value)) < 600


def test_more_devices_than_cores_are_warned_of():
    some = jax.devices()[:3]
    told = devices.oversubscription_warning(some, cores=2)
    assert told and told.startswith("the mesh has 3 devices on 2 core(s)")
    assert devices.oversubscription_warning(some, cores=3) is None
    assert devices.oversubscription_warning([SimpleNamespace(platform="gpu")] * 8, cores=2) is None
