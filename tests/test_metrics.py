import pytest
import torch

from supsup_lightning.callbacks import EvaluateSeenTasks
from supsup_lightning.errors import ConfigurationError
from supsup_lightning.report.metrics import TaskAccuracy, backward_transfer, forgetting

nan = float("nan")
MATRIX = torch.tensor([[0.9, nan, nan, nan], [0.95, 0.8, nan, nan], [nan, nan, nan, nan], [0.7, 0.85, 0.6, 0.9]])


def test_forgetting_and_backward_transfer_count_evaluated_cells_alone():
    # Task 0 was at best 0.95 and ends at 0.7, task 1 went from 0.8 to 0.85; tasks 2 and 3 were never seen before.
    assert forgetting(MATRIX) == pytest.approx((0.25 - 0.05) / 2)
    # Right after learning: task 0 0.9, task 1 0.8.
    assert backward_transfer(MATRIX) == pytest.approx((-0.2 + 0.05) / 2)


def test_what_was_not_evaluated_is_none():
    last_row_only = torch.full((3, 3), nan)
    last_row_only[-1] = 0.5
    assert forgetting(last_row_only) is None
    assert backward_transfer(last_row_only) is None
    assert forgetting(torch.tensor([[0.5]])) is None


def test_task_accuracy_sums_over_batches():
    metric = TaskAccuracy(2)
    metric.update(0, right=torch.tensor([True, False, False]), found=torch.tensor([True, True, False]))
    metric.update(0, right=torch.tensor([True]), found=torch.tensor([True]))
    accuracy, found = metric.compute()
    assert accuracy[0] == 0.5
    assert found[0] == 0.75
    assert accuracy[1].isnan()
    single = TaskAccuracy(1)
    single.update(0, right=torch.tensor([True]), found=torch.tensor([True]))
    assert single.compute().shape == (2, 1)  # torchmetrics squeezes tensors of one element


@pytest.mark.parametrize("eval_at", ["every", [0], [1.5], 3])
def test_bad_eval_at_is_refused(eval_at):
    with pytest.raises(ConfigurationError, match="eval_at="):
        EvaluateSeenTasks(eval_at=eval_at)
