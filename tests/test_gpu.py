"""What a CPU can prove about the GPU paths."""

import os
import re
import signal
from datetime import timedelta
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from torch.nn.parallel import DistributedDataParallel

from sample import stream
from support import runtime
from support.checkpoint import Run
from support.kernels import choose_kernels
from support.runtime import StopSignals, best_dtype, compile_now
from train import Settings, evaluate, make_optimizer, to_device

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
OFF = torch.autocast("cpu", enabled=False)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


def job(rank, size, device=CPU):
    """One of several ranks, whose sums and maxima are those of this one alone."""
    same = {"sum": lambda tensor: tensor, "maximum": lambda *values: list(values), "any": bool}
    return SimpleNamespace(rank=rank, size=size, device=device, say=lambda line: None, **same)


@pytest.mark.parametrize("kind", ["cuda", "mps", "cpu"])
def test_only_copies_to_cuda_from_pinned_memory_are_not_waited_for(kind):
    class Batch:
        pinned = False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            return self.pinned, non_blocking

    expected = (kind == "cuda", kind == "cuda")
    assert to_device((Batch(), Batch()), torch.device(kind)) == (expected, expected)


def test_gpus_without_bfloat16_use_float16_and_float32_uses_their_matrix_units(monkeypatch):
    for supported, expected in ((True, "bfloat16"), (False, "float16")):
        answer = lambda including_emulation, supported=supported: supported  # noqa: E731
        monkeypatch.setattr("torch.cuda.is_bf16_supported", answer)
        assert best_dtype(CUDA) == expected
    precisions = []
    monkeypatch.setattr("torch.set_float32_matmul_precision", precisions.append)
    choose_kernels(CUDA, "float32", 0)
    choose_kernels(CPU, "float32", 0)
    assert precisions == ["high"]


def test_gradients_are_exchanged_while_the_backward_pass_still_runs():
    """DDP cuts a model that is compiled inside it into a graph for each bucket of gradients."""
    graphs = []
    gpt = tiny_model(n_layer=4, n_embd=256)
    compiled = torch.compile(gpt, backend=lambda graph, inputs: graphs.append(graph) or graph)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = DistributedDataParallel(compiled, gradient_as_bucket_view=True, bucket_cap_mb=2)
        batch = torch.randint(65, (2, 16)), torch.randint(65, (2, 16))
        compile_now(network, gpt, batch, OFF, job(0, 2))
        assert len(graphs) > 4 and all(p.grad is None for p in gpt.parameters())
        network(*batch)[1].backward()
        n_graphs = len(graphs)
        del network  # before its process group, or it may hang
    finally:
        dist.destroy_process_group()
    assert len(graphs) == n_graphs > 4


def test_all_ranks_run_uncompiled_when_one_cannot_compile_and_memory_is_no_matter_of_compiling(
    monkeypatch,
):
    gpt, batch = tiny_model(), (torch.zeros(2, 16, dtype=torch.long),) * 2
    other, stances = job(0, 1), []
    other.any = lambda value: True  # another rank could not
    monkeypatch.setattr("torch.compiler.set_stance", stances.append)
    compile_now(gpt, gpt, batch, OFF, other)
    assert stances == ["force_eager"]

    def out_of_memory(*batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compile_now(out_of_memory, out_of_memory, batch, OFF, job(0, 1))
    assert len(stances) == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory use from /proc")
def test_a_gpu_rank_resumes_without_a_copy_of_the_checkpoint_and_one_rank_verifies_it(
    tmp_path, monkeypatch
):
    def used():  # MB that are not a file's
        return int(re.search(r"RssAnon:\s+(\d+)", open("/proc/self/status").read())[1]) / 1000

    state = {"step": 0, "evaluated": 0, "init_from": "auto", "model_args": {}, "tokenizer": {}}
    torch.save(state | {"model": {"w": torch.zeros(32_000_000)}}, tmp_path / "last.pt")  # 128 MB
    before = used()
    state = Run(tmp_path, job(1, 8, CUDA)).load("resume")
    assert used() - before < 32 and state["model"]["w"].sum() == 0

    checked = []
    monkeypatch.setattr("zipfile.ZipFile.testzip", lambda self: checked.append(self))
    for rank in range(8):
        Run(tmp_path, job(rank, 8, CUDA), read_only=True).load("resume")
    assert len(checked) == 1


@pytest.mark.parametrize("size", [2, 3, 8])
def test_evaluation_calls_the_model_as_often_on_each_rank_and_counts_every_batch_once(size):
    gpt = tiny_model()
    tokens = np.random.default_rng(0).integers(65, size=16 * 9 + 1).astype(np.uint16)
    calls, losses = [], []
    gpt.register_forward_pre_hook(lambda module, args: calls.append(rank))
    for rank in range(size):
        losses.append(evaluate(gpt, tokens, 2, ranks=job(rank, size)))
    assert len({calls.count(rank) for rank in range(size)}) == 1
    assert sum(losses) == pytest.approx(evaluate(gpt, tokens, 2), rel=1e-5)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_decoding_waits_for_a_gpu_once_in_16_tokens(options):
    """On the meta device, which has no values, looking at one raises."""
    gpt = tiny_model(block_size=64).to("meta")
    idx = torch.zeros(1, 5, dtype=torch.long, device="meta")
    tokens = stream(gpt, idx, 40, eos_token=0, **options)
    assert len(list(islice(tokens, 16))) == 16
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        next(tokens)


def test_muon_leaves_skipped_steps_to_the_device():
    optimizer = make_optimizer(tiny_model(), Settings(optimizer="muon"))
    assert optimizer._step_supports_amp_scaling  # else torch's scaler waits for .item()


def test_nccl_is_told_its_device(monkeypatch):
    seen = {}
    answer = lambda *args, **options: iter([(dist.HashStore(), 0, 1)])  # noqa: E731
    monkeypatch.setattr(dist, "rendezvous", answer)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: seen.update(options))
    for device, backend, expected in ((CUDA, "nccl", CUDA), (CUDA, "gloo", None)):
        runtime.join(backend, device, timedelta(seconds=5))
        assert seen["device_id"] == expected


PEAKS = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 NVL": 835, "NVIDIA A100-SXM4-80GB": 312}
PEAKS |= {"NVIDIA A10": 125, "NVIDIA A10G": None, "NVIDIA L4": 121, "NVIDIA L40": None}


@pytest.mark.parametrize("name, peak", PEAKS.items())
def test_the_peak_is_that_of_the_whole_name(monkeypatch, name, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    expected = None if peak is None else pytest.approx(1e6 / (peak * 1e12))
    assert runtime.mfu(1e6, CUDA) == expected


def test_the_second_signal_ends_a_rank_at_once_but_not_torchruns_echo_of_the_first(monkeypatch):
    handlers, ended = {}, []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    clock = iter([0.0, 0.5, 3.0])
    monkeypatch.setattr(runtime.time, "monotonic", lambda: next(clock))
    StopSignals(job(0, 2))
    for expected in ([], [], [signal.SIGTERM]):
        handlers[signal.SIGTERM](signal.SIGTERM, None)
        assert ended == expected


def test_deterministic_algorithms_are_chosen_before_the_ranks_meet(train, monkeypatch):
    class Meets(Exception):
        pass

    def meet(*arguments):
        assert torch.are_deterministic_algorithms_enabled()
        raise Meets

    monkeypatch.setattr("train.Ranks", meet)
    with pytest.raises(Meets):
        train(deterministic=True)
