"""What a worker's tuning keeps, without Ray and without a store."""

import torch

from dpdl_core.tune_state import TuneState
from infra.settings import Settings
from pipelines.run_record import EPOCHS, epochs_to_lines
from pipelines.train_keeper import WorkerKeeper


def test_what_was_set_aside_is_known_after_a_start_from_the_last_epoch():
    """No epoch follows that would keep it again: a manifest without it has it learnt next."""
    state = TuneState({"left_out": torch.tensor([3, 8])}, {})
    files = state.to_files() | {EPOCHS: epochs_to_lines([{"epoch": 1}])}
    keeper = WorkerKeeper(Settings(), {"incoming": {}}, lambda groups, keep=None: None, files)
    assert keeper.resume() is not None
    assert keeper.left_out.tolist() == [3, 8]
