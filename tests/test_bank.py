import pytest
import torch

from supsup_lightning import MaskBank
from supsup_lightning.errors import MismatchError


def filled(num_weights: int = 21, tasks=(0, 1, 2, 5), seed: int = 0) -> tuple[MaskBank, torch.Tensor]:
    bank = MaskBank(num_weights)
    masks = torch.rand(len(tasks), num_weights, generator=torch.Generator().manual_seed(seed)) < 0.4
    for task, mask in zip(tasks, masks, strict=True):
        bank.add(task, mask)
    return bank, masks


def test_add_get_remove():
    bank, masks = filled()
    assert len(bank) == 4
    assert 5 in bank
    assert 3 not in bank
    assert torch.equal(bank.get(5), masks[3])
    bank.remove(1)
    assert bank.tasks.tolist() == [0, 2, 5]
    assert torch.equal(bank.get(2), masks[2])
    assert torch.equal(bank.counts, masks[[0, 2, 3]].sum(0).int())
    with pytest.raises(KeyError, match="Task 1 has no mask"):
        bank.get(1)
    with pytest.raises(KeyError, match="Task 5 has a mask already"):
        bank.add(5, masks[0])


def test_products_equal_those_of_stacked_float_masks():
    bank, masks = filled()
    coefficients, vector = torch.randn(4), torch.randn(21)
    torch.testing.assert_close(bank.superpose(coefficients), coefficients @ masks.float())
    torch.testing.assert_close(bank.superpose(), masks.float().mean(0))
    torch.testing.assert_close(bank.project(vector), masks.float() @ vector)
    torch.testing.assert_close(bank.sparsity(), 1 - masks.float().mean(1))


def test_a_state_loads_into_a_fresh_bank_of_any_size():
    bank, _ = filled()
    for other in (MaskBank(21), filled(tasks=(7, 8), seed=1)[0]):
        other.load_state_dict(bank.state_dict())
        assert all(torch.equal(getattr(other, name), getattr(bank, name)) for name in ("packed", "tasks", "counts"))
    with pytest.raises(MismatchError, match="another network"):
        MaskBank(99).load_state_dict(bank.state_dict())


def test_merge_takes_what_is_new_and_refuses_what_differs():
    bank, masks = filled()
    other, more = filled(tasks=(8, 9), seed=1)
    other.add(0, masks[0])  # the same in both
    bank.merge(other)
    assert bank.tasks.tolist() == [0, 1, 2, 5, 8, 9]
    assert torch.equal(bank.get(9), more[1])
    clashing, _ = filled(tasks=(20, 1), seed=2)
    with pytest.raises(KeyError, match=r"Tasks \[1\] have different masks"):
        bank.merge(clashing)
    assert 20 not in bank


def test_memory_is_one_bit_a_weight():
    bank, _ = filled(num_weights=8000, tasks=range(50))
    assert bank.packed.nbytes == 50 * 1000
