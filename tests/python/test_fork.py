"""Layers in forked processes, whose parent has threads that they have not."""

import multiprocessing

import flexq
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def layer_and_input() -> tuple[flexq.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return flexq.Linear.from_float(nn.Linear(640, 320)), torch.randn(40, 640)


def run(layer, x, threads, connection):
    torch.set_num_threads(threads)
    connection.send(layer(x).numpy().tobytes())


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_multiprocessing_fork(two_threads, threads):
    layer, x = layer_and_input()
    expected = layer(x).numpy().tobytes()
    torch.randn(400, 400) @ torch.randn(400, 400)  # OpenMP's threads of PyTorch are up as well
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(layer, x, threads, sender))
    process.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv() == expected
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()


class Rows(Dataset):
    """Outputs of a layer, one row of the input each."""

    def __init__(self, layer: flexq.Linear, x: torch.Tensor):
        self.layer, self.x = layer, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.layer(self.x[i])


def test_data_loader_workers(two_threads):
    layer, x = layer_and_input()
    expected = layer(x)
    loader = DataLoader(Rows(layer, x), batch_size=8, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)
