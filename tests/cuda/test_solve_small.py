"""The one-block-per-system ridge solve against its definition, emulated and on a device."""

from __future__ import annotations

import liar_cuda_host
import pytest
import torch
from liar_systems import conditioned, covariances, lower_only
from liar_testing import assert_close_rms

from liar_ext.ops import _native_solve
from liar_ext.ops.attempt import Attempt, attempt_reference

SIZES = (1, 2, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128)
COLUMNS = (0, 1, 5, 33, 130)
PRECISIONS = (torch.float64, torch.float32)
# the systems below have conditions up to 1e4: 1e-16 times that and the size; float32 is refined
# until residual times condition is below 1e-8
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-7}
# eigenvalues are estimated from below and above, by few steps
ESTIMATE = 2.0
INVALID_CONFIGURATION = 9


def rights(batch, size, columns):
    return torch.randn(batch, size, columns, dtype=torch.float64)


def solve(place, matrix, right, strength, kept=None, dropped=None, working=torch.float64):
    """On the place's device with what must not be read poisoned; back on the CPU."""
    arguments = (lower_only(matrix), right, strength, kept, dropped)
    found = _native_solve.solve_small(*(place(a) for a in arguments), working)
    return Attempt(*(value.cpu() for value in found))


def assert_same_attempt(found: Attempt, true: Attempt, working: torch.dtype) -> None:
    ratio = TOLERANCE[working]
    assert found.info.tolist() == [0] * len(found.info)
    assert_close_rms(found.solution, true.solution, ratio)
    assert_close_rms(found.shift, true.shift, ratio)
    assert found.info.dtype == torch.int32
    # the smallest pivot is at least as sensitive as the smallest eigenvalue
    assert torch.allclose(found.pivot, true.pivot, rtol=1e-9 if working == torch.float64 else 1e-2)
    for estimate, eigenvalue in ((found.largest, true.largest), (true.smallest, found.smallest)):
        assert (estimate <= eigenvalue * 1.01).all()
        assert (estimate >= eigenvalue / ESTIMATE).all()
    assert (found.error <= 1e-10).all()


@pytest.mark.parametrize("working", PRECISIONS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_any_size_meets_the_definition(place, size, working):
    for index, columns in enumerate(COLUMNS):
        batch = 3 if index % 2 else 1
        matrix, right = covariances(batch, size), rights(batch, size, columns)
        strength = torch.linspace(1e-3, 1e-2, batch, dtype=torch.float64)
        kept, dropped = rights(batch, size, 1)[..., 0], rights(batch, columns, 1)[..., 0]
        found = solve(place, matrix, right, strength, kept, dropped, working)
        true = attempt_reference(matrix, right, strength, kept, dropped)
        assert_same_attempt(found, true, working)


def test_without_means_the_shift_is_zero(place):
    matrix, right = covariances(2, 40), rights(2, 40, 9)
    found = solve(place, matrix, right, torch.ones(2, dtype=torch.float64))
    assert torch.equal(found.shift, torch.zeros(2, 9, dtype=torch.float64))


@pytest.mark.parametrize("working", PRECISIONS, ids=str)
def test_dead_columns_get_zero_rows(place, working):
    """Also where their right-hand side and mean are not zero, or not numbers."""
    matrix, right = covariances(2, 70), rights(2, 70, 6)
    kept, dropped = rights(2, 70, 1)[..., 0], rights(2, 6, 1)[..., 0]
    for dead in (0, 33, 69):
        matrix[0, dead] = matrix[0, :, dead] = 0
        right[0, dead] = kept[0, dead] = torch.nan
    matrix[1] = 0  # every column
    strength = torch.tensor([0.01, 0.0], dtype=torch.float64)
    found = solve(place, matrix, right, strength, kept, dropped, working)
    true = attempt_reference(matrix, right.nan_to_num(0.0), strength, kept.nan_to_num(0.0), dropped)
    assert_same_attempt(found, true, working)
    assert (found.solution[0, [0, 33, 69]] == 0).all()
    assert (found.solution[1] == 0).all()
    # the identity: estimates of 1 up to the rounding of norms
    for value in (found.pivot, found.largest, found.smallest):
        assert value[1].item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("working", PRECISIONS, ids=str)
def test_one_failure_in_a_batch_is_its_own(place, working):
    matrix, right = covariances(5, 80), rights(5, 80, 7)
    kept, dropped = rights(5, 80, 1)[..., 0], rights(5, 7, 1)[..., 0]
    strength = torch.full((5,), 1e-3, dtype=torch.float64)
    good = solve(place, matrix, right, strength, kept, dropped, working)
    broken = matrix.clone()
    broken[0, 50, 50] *= 0.3  # indefinite: far below what the other columns explain of it
    broken[1, 75, 3] = broken[1, 3, 75] = torch.nan
    broken[2, 40, 40] = torch.nan
    broken[3, 33, 33] = torch.inf
    found = solve(place, broken, right, strength, kept, dropped, working)
    scale = (broken[0].diagonal() + strength[0]).rsqrt()
    scaled = (broken[0] * scale[:, None] * scale).fill_diagonal_(1.0)
    expected = int(torch.linalg.cholesky_ex(scaled).info)
    assert expected > 0
    assert found.info.tolist() == [expected, 76, 41, 34, 0]
    assert found.pivot[0] <= 0
    for value in (found.solution, found.shift, found.smallest, found.error):
        assert value[:4].isnan().all()
    for value, same in zip(found, good, strict=True):
        assert torch.equal(value[4], same[4])


def test_a_right_hand_side_that_is_not_a_number_stays_in_its_column(place):
    matrix, right = covariances(1, 50), rights(1, 50, 12)
    right[0, 20, 7] = torch.nan
    found = solve(place, matrix, right, torch.ones(1, dtype=torch.float64))
    assert found.info.item() == 0
    assert found.error.isnan().all()
    assert found.solution[0].isnan().any(0).tolist() == [column == 7 for column in range(12)]


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
def test_the_forward_error_of_float64_is_below_1e_6_up_to_a_condition_of_1e8(place, condition):
    matrix, true = conditioned(2, 96, condition), rights(2, 96, 20)
    found = solve(place, matrix, matrix @ true, torch.zeros(2, dtype=torch.float64))
    assert_close_rms(found.solution, true, 1e-6)
    assert (found.error <= 1e-15 * 96).all()
    eigenvalues = torch.linalg.eigvalsh(matrix)
    ratio = (found.largest / found.smallest) / (eigenvalues[:, -1] / eigenvalues[:, 0])
    assert (ratio > 1 / ESTIMATE).all()
    assert (ratio < 1.01).all()


@pytest.mark.parametrize(("condition", "error"), [(1e2, 1e-9), (1e4, 1e-7), (1e5, 1e-6)])
def test_float32_is_refined_to_the_accuracy_of_float64(place, condition, error):
    matrix, true = conditioned(2, 96, condition), rights(2, 96, 70)
    found = solve(
        place, matrix, matrix @ true, torch.zeros(2, dtype=torch.float64), working=torch.float32
    )
    assert_close_rms(found.solution, true, error)
    assert (found.error * found.largest / found.smallest <= 1e-8).all()


def test_float32_that_refinement_cannot_save_says_so_in_its_error(place):
    """Beyond a condition of 1e8 the factor may exist and be useless; the residual tells."""
    matrix, right = conditioned(3, 64, 1e10), rights(3, 64, 3)
    zero = torch.zeros(3, dtype=torch.float64)
    found = solve(place, matrix, right, zero, working=torch.float32)
    useless = found.error * found.largest / found.smallest > 1e-6
    assert ((found.info > 0) | useless).all()


def test_strides_of_the_inputs_are_followed(place):
    """A slice of wider rows, one matrix for the whole batch, and columns that are not adjacent."""
    matrix, right = covariances(1, 45), rights(3, 45, 11)
    strength = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    wide = torch.full((1, 60, 70), torch.nan, dtype=torch.float64)
    wide[:, 4:49, 9:54] = lower_only(matrix)
    spread = torch.full((3, 45, 33), torch.nan, dtype=torch.float64)
    spread[..., ::3] = right
    shared = place(wide)[:, 4:49, 9:54].expand(3, 45, 45)
    for b in (place(spread)[..., ::3], place(right.mT.contiguous()).mT):
        found = _native_solve.solve_small(shared, b, place(strength), None, None)
        true = attempt_reference(matrix.expand(3, 45, 45), right, strength)
        assert_close_rms(found.solution, true.solution, TOLERANCE[torch.float64])


def test_empty_batches_and_systems_are_allowed(place):
    none = torch.zeros(0, dtype=torch.float64)
    found = solve(place, none.view(0, 3, 3), none.view(0, 3, 2), none)
    assert found.solution.shape == (0, 3, 2)
    mean = torch.ones(2, 4, dtype=torch.float64)
    found = solve(
        *(place, none.view(2, 0, 0), none.view(2, 0, 4), mean[:, 0]),
        *(none.view(2, 0), mean),
    )
    assert torch.equal(found.shift, mean)
    assert found.info.tolist() == [0, 0]


@pytest.mark.parametrize("working", PRECISIONS, ids=str)
@pytest.mark.parametrize("size", [33, 64, 128])
def test_no_order_of_the_threads_changes_a_bit(emulated, size, working):
    matrix, right = covariances(1, size), rights(1, size, 70)
    strength = torch.full((1,), 1e-3, dtype=torch.float64)
    mean, dropped = right[..., 0].contiguous(), right[:, 0].contiguous()
    results = []
    for order in liar_cuda_host.ORDERS:
        emulated.order(*order)
        for processors in (1, 2):  # the second tile in the same block, and in one of its own
            emulated.device(processors=processors)
            found = _native_solve.solve_small(matrix, right, strength, mean, dropped, working)
            results.append(found)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_spreading_the_columns_over_blocks_changes_nothing(emulated):
    matrix, right = covariances(1, 70), rights(1, 70, 200)
    strength = torch.full((1,), 1e-3, dtype=torch.float64)
    results = []
    for processors in (1, 3, 100):
        emulated.device(processors=processors)
        results.append(_native_solve.solve_small(matrix, right, strength, None, None))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("shared", "size", "working"),
    [
        (166912, 128, torch.float64),  # sm_80: tiles of 32 columns
        (166912, 128, torch.float32),
        (101376, 96, torch.float32),  # sm_86, sm_89
        (101376, 64, torch.float64),
    ],
)
def test_devices_with_less_shared_memory_solve_the_same(emulated, shared, size, working):
    emulated.device(capability=80, shared=shared)
    matrix, right = covariances(1, size), rights(1, size, 40)
    strength = torch.full((1,), 1e-3, dtype=torch.float64)
    found = _native_solve.solve_small(matrix, right, strength, None, None, working)
    true = attempt_reference(matrix, right, strength)
    assert_same_attempt(found, true, working)
    assert emulated.solve_small_shared(size, int(working == torch.float32)) <= shared


def test_a_system_that_does_not_fit_is_refused_before_it_is_launched(emulated):
    emulated.device(capability=86, shared=101376)
    assert emulated.solve_small_shared(128, 0) > 101376
    assert emulated.solve_small_shared(129, 0) == -1
    with pytest.raises(RuntimeError, match=f"status {INVALID_CONFIGURATION}"):
        _native_solve.solve_small(
            covariances(1, 128), rights(1, 128, 2), torch.ones(1, dtype=torch.float64), None, None
        )


def test_bad_arguments_are_named(emulated):
    matrix, right = covariances(2, 5), rights(2, 5, 3)
    strength = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"matrix must be \(2, 5, 5\) torch.float64 on cpu; got"):
        _native_solve.solve_small(matrix.float(), right, strength, None, None)
    with pytest.raises(ValueError, match=r"strength must be \(2,\)"):
        _native_solve.solve_small(matrix, right, strength[:1], None, None)
    with pytest.raises(ValueError, match=r"mean_dropped must be \(2, 3\)"):
        _native_solve.solve_small(matrix, right, strength, right[..., 0], right[..., 0])


def test_availability_is_explained():
    cpu = torch.device("cpu")
    assert "up to 128 rows, not 129" in _native_solve.unavailable(cpu, 129)
    assert "not torch.float16" in _native_solve.unavailable(cpu, 8, torch.float16)
    assert _native_solve.unavailable(cpu) == "it needs a CUDA tensor, not cpu"


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "size"), [(64, 128), (256, 64)])
@pytest.mark.parametrize("working", PRECISIONS, ids=str)
def test_the_batches_of_the_benchmark(batch, size, working):
    device = torch.device("cuda")
    matrix, right = covariances(batch, size), rights(batch, size, size)
    strength = torch.full((batch,), 1e-3, dtype=torch.float64)
    found = _native_solve.solve_small(
        *(value.to(device) for value in (matrix, right, strength)), None, None, working
    )
    true = attempt_reference(matrix, right, strength)
    assert_same_attempt(Attempt(*(value.cpu() for value in found)), true, working)


@pytest.mark.gpu
def test_it_runs_on_the_current_stream_and_in_a_graph():
    device = torch.device("cuda")
    matrix, right = covariances(8, 96).to(device), rights(8, 96, 50).to(device)
    strength = torch.full((8,), 1e-3, dtype=torch.float64, device=device)
    expected = _native_solve.solve_small(matrix, right, strength, None, None)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = right.clone()  # exists only after the sleep: another stream would read garbage
        found = _native_solve.solve_small(matrix, late, strength, None, None)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(right)
    with torch.cuda.graph(graph):
        captured = _native_solve.solve_small(matrix, static, strength, None, None)
    static.copy_(right)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
