"""The compiled kernel of the noise gives what PyTorch's operations and float64 give."""

import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from dp_trainer.privacy import noise as noise_module
from dp_trainer.privacy.noise import NoiseGenerator

KERNEL = noise_module._kernel
needs_kernel = pytest.mark.skipif(KERNEL is None, reason="the kernel was not built")
# Both ends of either half, zero, quarter turns and their neighbours.
EDGES = [0, 1, 2**29 - 1, 2**29, 2**29 + 1, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 3 * 2**29]
EDGES += [3 * 2**30, 2**32 - 2**29, 2**32 - 2**29 - 1, 2**32 - 2, 2**32 - 1]


def words_of(numbers):
    return torch.tensor(numbers, dtype=torch.int64).sub(2**31).bitwise_xor(-(2**31)).to(torch.int32)


def exact(values, words, std, divisor):
    """Box and Muller's transform in float64, from words in two halves."""
    count = len(values)
    half = (count + 1) // 2
    numbers = words.long() % 2**32
    radii, angles = numbers[:half] % 2**31, numbers[half : 2 * half]
    radius = std * torch.sqrt(-2 * torch.log((radii.double() + 1) / 2**31))
    angle = angles.double() * (2 * math.pi / 2**32)
    added = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)))[:count]
    return (values.double() + added) / divisor


@pytest.mark.skipif(
    not shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    or not (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    reason="no C compiler or no headers of Python",
)
def test_it_is_built_where_it_can_be():
    """Otherwise every test here would be passed over in silence."""
    assert KERNEL is not None, (
        "not built, or built from another version of box_muller.c: install the package again"
    )


@needs_kernel
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 1000, 1001])
@pytest.mark.parametrize(("std", "divisor"), [(1.0, 1.0), (0.37, 64.0), (2e4, 0.5)])
def test_it_follows_float64(count, std, divisor):
    generator = torch.Generator().manual_seed(count)
    numbers = torch.randint(2**32, (count + 1,), generator=generator, dtype=torch.int64).tolist()
    words = words_of(numbers)
    values = torch.randn(count + 2, generator=generator)
    expected = exact(values[:count], words, std, divisor)
    beyond = values[count:].clone()
    KERNEL.add(values.data_ptr(), words.data_ptr(), count, std, divisor)
    assert (values[:count].double() - expected).abs().max() <= 1e-6 * std / divisor + 1e-6 / divisor
    assert torch.equal(values[count:], beyond)


@needs_kernel
def test_it_follows_float64_at_the_edges():
    """Each edge as a radius with each as an angle: 32 bits at their ends must not overflow."""
    radii = [r for r in EDGES for _ in EDGES]
    angles = EDGES * len(EDGES)
    words, values = words_of(radii + angles), torch.zeros(2 * len(radii))
    expected = exact(values, words, 1.0, 1.0)
    KERNEL.add(values.data_ptr(), words.data_ptr(), len(values), 1.0, 1.0)
    # Near u = 1 the radius is the root of a rounded number.
    assert (values.double() - expected).abs().max() <= 3e-4
    away = torch.tensor([r % 2**31 < 2**31 - 1024 for r in radii]).repeat(2)
    assert (values.double() - expected)[away].abs().max() <= 1.5e-6
    assert values.abs().max() == pytest.approx(math.sqrt(-2 * math.log(2**-31)), rel=1e-6)


@needs_kernel
@pytest.mark.parametrize("count", [5, 2**17, 2**17 + 1, 300_001])
def test_a_generator_gives_the_same_with_and_without_it(count, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    drawn = []
    for kernel in (KERNEL, None):
        monkeypatch.setattr(noise_module, "_kernel", kernel)
        noise = NoiseGenerator(device="cpu", insecure_seed=8)
        drawn.append([noise.add_noise_(torch.ones(count), 0.5, divisor=3.0) for _ in range(2)])
    for ours, twins in zip(*drawn, strict=True):
        torch.testing.assert_close(ours, twins, rtol=0, atol=5e-7)
    assert not torch.equal(*drawn[0])


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "threads", "used"), [("float32", 1, True), ("float64", 1, False), ("float32", 64, False)]
)
def test_it_is_used_for_float32_and_few_threads(dtype, threads, used, monkeypatch):
    calls = []

    class Spy:
        @staticmethod
        def add(*arguments):
            calls.append(arguments)
            KERNEL.add(*arguments)

    monkeypatch.setattr(noise_module, "_kernel", Spy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    NoiseGenerator(device="cpu").add_noise_(torch.zeros(10, dtype=getattr(torch, dtype)), 1.0)
    assert bool(calls) == used


class _Subclass(torch.Tensor):
    pass


@needs_kernel
@pytest.mark.parametrize("kind", ["subclass", "requires_grad", "negative bit"])
def test_it_is_not_used_where_a_tensor_is_more_than_its_memory(kind, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(noise_module, "_kernel", None)
    values = torch.ones(10)
    values = {
        "subclass": lambda: values.as_subclass(_Subclass),
        "requires_grad": lambda: values.requires_grad_(),
        "negative bit": lambda: torch._neg_view(-values),
    }[kind]()
    expected = NoiseGenerator(device="cpu", insecure_seed=1)._keystream
    twin = torch.ones(10)
    expected.add_to_(twin, 1.0, 2.0)

    class Refusing:
        @staticmethod
        def add(*arguments):
            raise AssertionError("used")

    monkeypatch.setattr(noise_module, "_kernel", Refusing)
    with torch.no_grad():
        NoiseGenerator(device="cpu", insecure_seed=1)._keystream.add_to_(values, 1.0, 2.0)
    torch.testing.assert_close(values.detach().as_subclass(torch.Tensor), twin)


@needs_kernel
def test_autograd_sees_what_it_wrote(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    total = torch.ones(10)
    before = total._version
    NoiseGenerator(device="cpu").add_noise_(total, 1.0)
    assert total._version > before


@needs_kernel
def test_a_kernel_of_another_version_is_not_used():
    class Swapped:
        @staticmethod
        def add(values, words, count, std, divisor):
            KERNEL.add(values, words, count, divisor, std)

    class Fewer:
        @staticmethod
        def add(values, words, count):
            pass

    assert noise_module._checked(KERNEL) is KERNEL
    for other in (None, Swapped, Fewer):
        assert noise_module._checked(other) is None


@needs_kernel
@pytest.mark.parametrize("arguments", [(0, 1, 4), (1, 0, 4), (1, 1, -1)])
def test_no_memory_is_an_error(arguments):
    with pytest.raises(ValueError, match="no memory"):
        KERNEL.add(*arguments, 1.0, 1.0)
