"""Two processes of torch.distributed end with what one ends with. This file is also the worker."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from dpdl_core import distributed
from dpdl_core.codebook import EmaCodebook, assign, kmeans, match, refresh
from dpdl_core.losses import RunningMargin


def data() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = 4 * torch.randn(12, 8, generator=generator)
    x = centers[torch.randint(12, (900,), generator=generator)]
    return x + torch.randn(900, 8, generator=generator)


def shard(x: torch.Tensor) -> torch.Tensor:
    """Uneven: 500 rows and 400."""
    return x if distributed.world_size() == 1 else x.split([500, 400])[distributed.rank()]


def work() -> dict[str, torch.Tensor]:
    """All that is collective, on this rank's rows; every figure is the same on all ranks."""
    x = shard(data())
    # Other ranks' generators are out of step on purpose: rank 0's draws count.
    generator = torch.Generator().manual_seed(distributed.rank())
    book = kmeans(x, 16, restarts=2, generator=generator)
    starved = torch.cat([book.means[:15], torch.full((1, 8), 1e3)])  # one code has no vector
    rescued = kmeans(x, 16, init=starved)
    renewed = refresh(x + 0.3, book.means, book.shrunk_variances(), book.log_weights)
    before, _ = assign(x, book.means)
    after, _ = assign(x, book.means.flip(0))
    ema = EmaCodebook(book, decay=0.9)
    ema.share[3] = 1e-6
    replaced = ema.update(x)
    return {
        "means": book.means,
        "counts": book.counts,
        "variances": book.variances,
        "inertia": torch.tensor(book.inertia),
        "rescued": rescued.means,
        "rescued counts": rescued.counts,
        "renewed": renewed.means,
        "renewed weights": renewed.log_weights,
        "match": match(before, after, 16),
        "ema": ema.means,
        "ema share": ema.share,
        "ema replaced": replaced,
        "margin": RunningMargin().update(x[:, 0]),
        "rows": distributed.gather_rows(x),
        "an empty shard": distributed.gather_rows(x[: 0 if distributed.rank() else 3]),
        "sum": distributed.all_sum(x.sum(0)),
    }


def main(rank: int, ranks: int, folder: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    torch.save(work(), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_alone_all_is_the_identity():
    x = data()
    assert not distributed.is_distributed()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_rows(x) is x
    assert distributed.all_sum(x) is x
    assert distributed.broadcast(x) is x
    assert distributed.row_counts(x) == [900]


def test_two_ranks_end_with_what_one_ends_with(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    alone = work()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, want in alone.items():
        assert torch.equal(first[name], second[name]), f"{name}: ranks disagree"
        if want.is_floating_point():
            torch.testing.assert_close(first[name], want, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(first[name], want), name
    assert alone["ema replaced"].nonzero().flatten().tolist() == [3]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
