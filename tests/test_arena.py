"""Several tensors in one allocation."""

import pytest
import torch

from ep_moe.comm.arena import Arena

DTYPES = [torch.int32, torch.int64, torch.float32, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 7), (0,), (4, 0)])
def test_parts_hold_what_is_written_to_them(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    arena = Arena(torch.device("cpu"), before=13, part=numel * dtype.itemsize, behind=4)
    before, behind = arena.tensor("before", 3), arena.tensor("behind", 1)
    part = arena.tensor("part", *shape, dtype=dtype)
    before.fill_(-1)
    behind.fill_(-2)
    values = torch.randint(0, 2, shape).to(dtype)
    part.copy_(values)
    assert part.shape == shape and part.dtype == dtype and part.is_contiguous()
    assert torch.equal(part, values)
    assert before.tolist() == [-1, -1, -1] and behind.tolist() == [-2]


def test_addresses_are_those_of_the_tensors() -> None:
    arena = Arena(torch.device("cpu"), a=1, b=200, empty=0, c=8)
    tensors = [arena.tensor(part, 1, dtype=torch.uint8) for part in "abc"]
    assert [x.data_ptr() for x in tensors] == [arena.addresses[part] for part in "abc"]
    assert all((address - arena.addresses["a"]) % 128 == 0 for address in arena.addresses.values())
    assert all(x.untyped_storage().data_ptr() == arena.memory.data_ptr() for x in tensors)
