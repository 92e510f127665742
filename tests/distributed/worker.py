"""What each process of a test run does: measures, on all ranks together, and leaves the numbers in a file.

    PYTHONPATH=tests torchrun --nproc-per-node 2 tests/distributed/worker.py RESULT.json [check …]

Rank 0 writes {check: {what: number}}. Whatever compares with "one process" computes that on each rank by
itself, without any collective call.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import reference
import torch
import torch.distributed as dist
import transformers
from cases import MODEL_CASES
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distributed.launch import leave
from dp_trainer import AutomaticClipping, FlatClipping, PrivacyArguments, UnsupportedOperationError, certify
from dp_trainer.batches import micro_batch_size, select
from dp_trainer.distributed import Ranks, RankSampler, sampler_of
from dp_trainer.errors import ConfigurationError
from dp_trainer.gradients.strategies import clipped_gradient_sum
from dp_trainer.losses import per_sample_loss_for
from dp_trainer.privacy.noise import NoiseGenerator
from dp_trainer.privacy.plan import make_plan
from dp_trainer.privacy.sampling import PoissonSampler, insecure_key
from dp_trainer.release import release

CASES = {case.name: case for case in MODEL_CASES}
REPLICATED = ("gpt2-tied", "roberta-classifier", "llama-tied")
SHARDED = ("gpt2-tied", "llama-tied", "roberta-classifier", "vit", "bart-tied", "gemma3-tied")
CHECKS: dict[str, Callable[[Ranks], dict[str, object]]] = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def built(name, dtype=torch.float32):
    """The same model and samples on every rank."""
    torch.manual_seed(0)
    case = CASES[name]
    return case.build(dtype), case.micro_batch()


def plan_for(batch, clipping_norm, noise_multiplier=0.0):
    arguments = PrivacyArguments(
        noise_multiplier=noise_multiplier, target_delta=1e-6, clipping="flat", clipping_norm=clipping_norm
    )
    return make_plan(arguments, dataset_size=1000, expected_batch_size=batch, steps=1)


def settings(loss, plan, noise, ranks):
    return {
        "per_sample_loss": loss, "plan": plan, "noise": noise, "strategy": "automatic",
        "rounding_margin": 0.0, "verified": set(), "ranks": ranks,
    }  # fmt: skip


def shares(size, ranks, empty_rank=None):
    """Which samples each rank has; one rank may have none."""
    takers = [rank for rank in range(ranks.size) if rank != empty_rank]
    return {
        rank: list(range(size))[takers.index(rank) :: len(takers)] if rank in takers else []
        for rank in range(ranks.size)
    }


def pieces_of(micro_batch, indices, size):
    return [select(micro_batch, indices[i : i + size]) for i in range(0, len(indices), size)]


def distance(sums, expected):
    return reference.distance({n: reference.whole(t) for n, t in sums.items()}, expected)


def one_process(model, micro_batch, loss):
    """Norms and the clipped sum, some samples clipped and some not, by plain autograd one sample at a time."""
    norms = clipped_gradient_sum(
        model, [micro_batch], per_sample_loss=loss, clipping=FlatClipping(1.0), strategy="loop"
    ).norms
    clipping = FlatClipping(float(norms.median()) * 1.01)
    result = clipped_gradient_sum(
        model, [micro_batch], per_sample_loss=loss, clipping=clipping, strategy="loop"
    )
    assert (norms > clipping.clipping_norm).any()
    assert (norms < clipping.clipping_norm).any()
    return result, clipping


# Replicated models.


@check
def replicated_sums(ranks):
    """Noise off: every rank ends with one process's sum, whoever has how many samples."""
    errors = {}
    for name in REPLICATED:
        for empty_rank in (None, ranks.size - 1):
            model, micro_batch = built(name)
            loss = per_sample_loss_for(model)
            expected, clipping = one_process(model, micro_batch, loss)
            batch = micro_batch_size(micro_batch)
            plan = plan_for(batch, clipping.clipping_norm)
            own = shares(batch, ranks, empty_rank)[ranks.rank]
            # Unequal numbers of micro-batches.
            pieces = pieces_of(micro_batch, own, 1 if ranks.rank == 0 else 3)
            report = release(model, pieces, **settings(loss, plan, ranks.noise_generator(), ranks))
            means = {n: g / batch for n, g in expected.gradients.items()}
            errors[f"{name}, empty {empty_rank}"] = distance(
                {n: p.grad for n, p in model.named_parameters()}, means
            )
            assert report.samples == batch
            assert abs(float(report.mean_loss) - float(expected.losses.mean())) < 1e-5
    return errors


@check
def empty_draw(ranks):
    """No rank has a sample: noise is released all the same."""
    model, _ = built("gpt2-tied")
    plan = plan_for(4, 1.0, noise_multiplier=1.0)
    loss = per_sample_loss_for(model)
    release(model, [], **settings(loss, plan, ranks.noise_generator(), ranks))
    values = torch.cat([p.grad.flatten() for p in model.parameters()]) * 4
    return {"std": float(values.std()), "equal": equal_on_all(values)}


def noise_of(ranks, generator, *, std=1.0, entries=600_000):
    """The noise that a release of zeros leaves on each rank, (ranks, entries), the same on all."""
    sums = {"a": torch.zeros(entries // 2), "b": torch.zeros(entries - entries // 2)}
    noised = dict(ranks.add_noise_once_(sums, generator, std, divisor=1))
    values = torch.cat([noised["a"], noised["b"]])
    everyone = [torch.empty_like(values) for _ in range(ranks.size)]
    dist.all_gather(everyone, values)
    return torch.stack(everyone)


def describe_noise(values, ranks):
    """Std of all entries, and how alike the slices of different ranks are."""
    first = values[0]
    slices = first[: len(first) // ranks.size * ranks.size].view(ranks.size, -1)
    alike = torch.corrcoef(slices)
    return {
        "std": float(first.std()),
        "replicas differ by": float((values - first).abs().max()),
        "largest correlation": float((alike - torch.eye(ranks.size)).abs().max()),
    }


@check
def noise(ranks):
    return describe_noise(noise_of(ranks, ranks.noise_generator()), ranks)


@check
def noise_with_a_fixed_seed(ranks):
    return describe_noise(noise_of(ranks, ranks.noise_generator(insecure_seed=5)), ranks)


@check
def noise_two_releases(ranks):
    generator = ranks.noise_generator()
    first, second = noise_of(ranks, generator)[0], noise_of(ranks, generator)[0]
    return {"correlation": float(torch.corrcoef(torch.stack([first, second]))[0, 1])}


@check
def planted_one_seed_on_all_ranks(ranks):
    return describe_noise(noise_of(ranks, NoiseGenerator(device="cpu", insecure_seed=5)), ranks)


@check
def planted_noise_on_each_rank_before_the_sum(ranks):
    """σ/√W on every rank, all with one key: the sum has √W times the std."""
    entries = 100_000
    generator = NoiseGenerator(device="cpu", insecure_seed=5)
    values = generator.gaussian((entries,), 1.0 / ranks.size**0.5)
    dist.all_reduce(values)
    return describe_noise(torch.stack([values] * ranks.size), ranks)


# Sampling.


def inclusion(ranks, sampler, draws=400):
    """How often samples come up, how often two samples of a draw do, and whether shares overlap."""
    counts = torch.zeros(draws, sampler.sampler.dataset_size)
    for draw, share in zip(range(draws), sampler, strict=False):
        counts[draw, share] += 1
    dist.all_reduce(counts)
    centred = counts - counts.mean(0)
    alike = (centred.T @ centred) / draws
    alike.fill_diagonal_(0)
    q = sampler.sampler.sampling_probability
    return {
        "frequency": float(counts.mean()),
        "most in one draw": float(counts.max()),
        "largest covariance": float(alike.abs().max()) / (q * (1 - q)),
    }


@check
def sampling(ranks):
    plan = make_plan(
        PrivacyArguments(noise_multiplier=1.0, target_delta=1e-6),
        dataset_size=60, expected_batch_size=6, steps=1,
    )  # fmt: skip
    lengths = torch.arange(60).tolist()
    sampler = sampler_of(plan, range(60), ranks, lengths)
    sampler.sampler.steps = 400
    return inclusion(ranks, sampler)


@check
def draws_after_uneven_epochs(ranks):
    """Ranks that have drawn ahead by different numbers go on with the same draw."""
    plan = make_plan(
        PrivacyArguments(noise_multiplier=1.0, target_delta=1e-6),
        dataset_size=60, expected_batch_size=6, steps=1,
    )  # fmt: skip
    sampler = sampler_of(plan, range(60), ranks, None)
    for _ in zip(range(2 + 3 * ranks.rank), sampler, strict=False):
        pass
    share = next(iter(sampler))
    counts = torch.zeros(60)
    counts[share] += 1
    dist.all_reduce(counts)
    taken = torch.tensor([sampler._taken, -sampler._taken])
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return {"most in one draw": float(counts.max()), "taken differ by": int(taken.sum())}


class _Shard(RankSampler):
    """Planted: every rank draws over its own shard of the data, all with one seed."""

    def share(self, draw):
        return [
            index * self.ranks.size + self.ranks.rank for index in draw if (index + 1) * self.ranks.size <= 60
        ]


@check
def planted_draws_over_shards_with_one_seed(ranks):
    sampler = PoissonSampler(
        dataset_size=60, sampling_probability=0.1, batch_cap=60, steps=400, key=insecure_key(1)
    )
    return inclusion(ranks, _Shard(sampler, ranks))


@check
def balance(ranks):
    """Tokens of the busiest rank over the mean, dealt by length and dealt as drawn."""
    generator = torch.Generator().manual_seed(3)
    lengths = (torch.rand(5000, generator=generator) ** 4 * 500 + 5).long().tolist()
    draw = torch.randperm(5000, generator=generator)[:64].tolist()
    result = {}
    for name, known in (("by length", lengths), ("as drawn", None)):
        share = RankSampler(range(1), ranks, known).share(draw)
        tokens = torch.tensor([float(sum(lengths[i] for i in share)), float(len(share))])
        most, total = tokens.clone(), tokens.clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        dist.all_reduce(total)
        result[name] = float(most[0] / (total[0] / ranks.size))
        assert int(total[1]) == len(draw)
    return result


@check
def other_order(ranks):
    """The same samples, numbered differently on one rank, are refused; numbered alike, they are not."""
    model, _ = built("gpt2-tied")
    plan = plan_for(4, 1.0, noise_multiplier=1.0)
    samples = [{"input_ids": [i, i + 1]} for i in range(1000)]
    assert ranks.check_run(model, samples, plan) is None
    if ranks.rank == ranks.size - 1:
        samples[500], samples[-1] = samples[-1], samples[500]
    try:
        ranks.check_run(model, samples, plan)
    except ConfigurationError as error:
        return {"message": str(error)}
    return {"message": ""}


@check
def disagreement(ranks):
    """Ranks with different data are refused, on every rank."""
    try:
        ranks.check_same({"the dataset's length": 100 + ranks.rank, "the plan": "same"})
    except ConfigurationError as error:
        return {"message": str(error)}
    return {"message": ""}


# Sharded models.


def sharded(model, mesh, **options):
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    for name, blocks in lists:
        if not any(name.startswith(outer + ".") for outer, _ in lists):
            for block in blocks:
                fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def released_by_shards(name, ranks, mesh, *, pieces=None, noise_multiplier=0.0, change=lambda model: None):
    model, micro_batch = built(name)
    change(model)
    loss = per_sample_loss_for(model)
    expected, clipping = one_process(model, micro_batch, loss)
    sharded(model, mesh)
    batch = micro_batch_size(micro_batch)
    own = shares(batch, ranks)[ranks.rank]
    if pieces is None:
        pieces = pieces_of(micro_batch, own, 1 if ranks.rank == 0 else 3)
    fillers = [select(micro_batch, [0])] * (ranks.most(len(pieces)) - len(pieces))
    plan = plan_for(batch, clipping.clipping_norm, noise_multiplier)
    release(model, pieces, fillers=fillers, **settings(loss, plan, ranks.noise_generator(), ranks))
    means = {n: g / batch for n, g in expected.gradients.items()}
    return model, means, plan


@check
def sharded_sums(ranks):
    mesh = init_device_mesh("cpu", (ranks.size,))
    errors = {}
    for name in SHARDED:
        model, means, _ = released_by_shards(name, ranks, mesh)
        errors[name] = distance({n: p.grad for n, p in model.named_parameters()}, means)
    return errors


@check
def sharded_adapters(ranks):
    """LoRA over a frozen, sharded base."""
    from peft import LoraConfig, get_peft_model

    mesh = init_device_mesh("cpu", (ranks.size,))
    model, micro_batch = built("llama-tied")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    loss = per_sample_loss_for(model)
    expected, clipping = one_process(model, micro_batch, loss)
    sharded(model, mesh)
    own = shares(micro_batch_size(micro_batch), ranks)[ranks.rank]
    result = clipped_gradient_sum(
        model, [select(micro_batch, own)], per_sample_loss=loss, clipping=clipping, verified=set()
    )
    return {"error": distance(result.gradients, expected.gradients)}


@check
def sharded_checkpointing(ranks):
    mesh = init_device_mesh("cpu", (ranks.size,))

    def change(model):
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})

    model, means, _ = released_by_shards("gpt2-tied", ranks, mesh, change=change)
    return {"error": distance({n: p.grad for n, p in model.named_parameters()}, means)}


@check
def hybrid_sharding(ranks):
    """Replicas of one shard: the same sum, and the same noise, on each."""
    shards = 2 if ranks.size == 4 else 1
    mesh = init_device_mesh("cpu", (ranks.size // shards, shards), mesh_dim_names=("replicas", "shards"))
    model, means, _ = released_by_shards("gpt2-tied", ranks, mesh)
    error = distance({n: p.grad for n, p in model.named_parameters()}, means)
    model, means, plan = released_by_shards("gpt2-tied", ranks, mesh, noise_multiplier=1.0)
    noise = {
        n: p.grad.to_local() - means[n].chunk(shards)[mesh.get_coordinate()[1]]
        for n, p in model.named_parameters()
    }
    values = torch.cat([noise[n].flatten() for n in noise])
    return {
        "error": error,
        "std": float(values.std()) * plan.divisor / plan.noise_std,
        "equal": equal_on_all(values, mesh.get_group("replicas")),
    }


@check
def sharded_noise(ranks):
    """Std over all shards, and how alike the shards' noise is."""
    mesh = init_device_mesh("cpu", (ranks.size,))
    layer = nn.Linear(999, 301)  # uneven shards
    fully_shard(layer, mesh=mesh)
    plan = plan_for(4, 1.0, noise_multiplier=1.0)
    loss = lambda model, batch: model(batch["x"]).sum(1)  # noqa: E731
    release(layer, [], **settings(loss, plan, ranks.noise_generator(), ranks))
    values = layer.weight.grad.full_tensor().flatten() * plan.divisor
    own = layer.weight.grad.to_local().flatten()
    length = 70 * 999  # no shard has less
    slices = [torch.empty(length) for _ in range(ranks.size)]
    dist.all_gather(slices, own[:length].contiguous())
    alike = torch.corrcoef(torch.stack(slices)) - torch.eye(ranks.size)
    return {"std": float(values.std()), "largest correlation": float(alike.abs().max())}


@check
def sharded_certificate(ranks):
    mesh = init_device_mesh("cpu", (ranks.size,))
    model, micro_batch = built("gpt2-tied")
    loss = per_sample_loss_for(model)
    sharded(model, mesh)
    before = {n: reference.whole(p.detach()).clone() for n, p in model.named_parameters()}
    found = certify(model, micro_batch, per_sample_loss=loss, clipping=AutomaticClipping())
    moved = max(
        float((reference.whole(p.detach()) - before[n]).abs().max()) for n, p in model.named_parameters()
    )
    return {"norm error": found.norm_error, "sum error": found.sum_error, "largest": found.largest_contribution,
            "weights moved by": moved}  # fmt: skip


@check
def sharded_bfloat16(ranks):
    mesh = init_device_mesh("cpu", (ranks.size,))
    model, micro_batch = built("llama-tied")
    loss = per_sample_loss_for(model)
    expected, clipping = one_process(model, micro_batch, loss)
    sharded(
        model, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    )
    own = shares(micro_batch_size(micro_batch), ranks)[ranks.rank]
    one = clipped_gradient_sum(
        model, [select(micro_batch, own[:1])], per_sample_loss=loss, clipping=FlatClipping(1e-3)
    )
    length = sum(float(reference.whole(g).square().sum()) for g in one.gradients.values()) ** 0.5
    result = clipped_gradient_sum(model, [select(micro_batch, own)], per_sample_loss=loss, clipping=clipping)
    return {
        "error": distance(result.gradients, expected.gradients),
        "contributions over their bound": length / (1e-3 * ranks.size),
        "dtype": str(next(iter(result.gradients.values())).dtype),
    }


@check
def what_sharding_refuses(ranks):
    """Each is an error on every rank, before anything is released."""
    mesh = init_device_mesh("cpu", (ranks.size,))
    messages = {}
    model, micro_batch = built("t5-tied")
    loss = per_sample_loss_for(model)
    sharded(model, mesh)
    strategies = {"position bias": "automatic", "loop": "loop", "direct": "direct", "two_pass": "two_pass"}
    for name, strategy in strategies.items():
        if strategy == "loop":
            model, micro_batch = built("gpt2-tied")
            loss = per_sample_loss_for(model)
            sharded(model, mesh)
        try:
            own = select(micro_batch, [ranks.rank])
            clipped_gradient_sum(
                model, [own], per_sample_loss=loss, clipping=FlatClipping(1.0), strategy=strategy
            )
            messages[name] = ""
        except UnsupportedOperationError as error:
            messages[name] = str(error)
    return messages


# What goes over the wires.


@check
def bytes_sent(ranks):
    """Bytes given to collective calls for one logical batch of four micro-batches, ours and plain DDP's."""
    sent = {"bytes": 0}
    patched = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")
    kept = {name: getattr(dist, name) for name in patched}

    def counted(name):
        def call(*args, **kwargs):
            # A ring moves (W - 1) / W of the tensor in a scatter or a gather, and twice that in an all-reduce.
            largest = max(a.numel() * a.element_size() for a in args if isinstance(a, torch.Tensor))
            sent["bytes"] += largest * (2 if name == "all_reduce" else 1)
            return kept[name](*args, **kwargs)

        return call

    model, micro_batch = built("gpt2-tied")
    loss = per_sample_loss_for(model)
    plan = plan_for(5, 1.0)
    pieces = pieces_of(micro_batch, list(range(4)), 1)
    for name in patched:
        setattr(dist, name, counted(name))
    try:
        release(model, pieces, **settings(loss, plan, ranks.noise_generator(), ranks))
    finally:
        for name in patched:
            setattr(dist, name, kept[name])
    ours = sent["bytes"]

    model, micro_batch = built("gpt2-tied")
    wrapped = nn.parallel.DistributedDataParallel(model)
    plain = [0]

    def hook(_state, bucket):
        plain[0] += 2 * bucket.buffer().numel() * bucket.buffer().element_size()
        tensor = bucket.buffer()
        return dist.all_reduce(tensor, async_op=True).get_future().then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, hook)
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        with wrapped.no_sync() if not last else contextlib.nullcontext():
            wrapped(**piece).loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    return {"ours": ours, "plain": plain[0], "parameters": parameters}


def equal_on_all(values, group=None):
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, values, group=group)
    return all(torch.equal(each, values) for each in everyone)


def main(result: str, *names: str) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    ranks = Ranks.current(torch.device("cpu"))
    found = {name: CHECKS[name](ranks) for name in names or CHECKS}
    everyone = [None] * ranks.size
    dist.all_gather_object(everyone, found)
    if ranks.rank == 0:
        Path(result).write_text(json.dumps(everyone), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
