"""What was measured, as costs: linear in the error, summed, kept in a file that is checked."""

from __future__ import annotations

import json

import pytest

from quantkit.allocate.measured import MeasuredGroup, Sensitivity, load_sensitivity
from quantkit.errors import UsageError
from quantkit.types import GgmlType as T
from quantkit.types import TensorSpec


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, "attention.q", 0, (256, 256))


def sensitivity(**changes: object) -> Sensitivity:
    values = {
        "digest": "d",
        "text": "t",
        "errors": {"a": {"Q8_0": 1e-5, "Q2_K": 0.08}, "b": {"Q8_0": 2e-5, "Q2_K": 0.04}},
        "groups": (MeasuredGroup(name="g", tensors=("a", "b"), error=0.1, kld=0.02),),
        "joint": ((0.01, 0.012), (0.1, 0.15)),
    }
    return Sensitivity.model_validate(values | changes)


def test_a_tensor_costs_its_part_of_the_group_in_proportion_to_its_error():
    costs = sensitivity().costs()
    assert costs(spec("a"), T.Q2_K) == pytest.approx(0.02 * 0.08 / 0.1 / 2)
    assert costs(spec("b"), T.Q2_K) == pytest.approx(0.02 * 0.04 / 0.1 / 2)


def test_a_whole_model_costs_the_sum_of_what_may_change():
    specs = [spec("a"), spec("b"), TensorSpec("n", "norm", 0, (256,), keep=T.F32)]
    costs = sensitivity().costs()
    total = costs.total(specs, {"a": T.Q2_K, "b": T.Q8_0})
    assert total == pytest.approx(costs(specs[0], T.Q2_K) + costs(specs[1], T.Q8_0))


def test_what_was_not_measured_is_out_unless_it_is_as_good_as_exact():
    costs = sensitivity().costs()
    assert costs(spec("a"), T.Q4_K) == float("inf")
    assert costs(spec("a"), T.BF16) == 0


@pytest.mark.parametrize(
    ("cost", "kld"),
    [(0.0, 0.0), (0.01, 0.012), (0.1, 0.15), (0.005, 0.006)],
)
def test_predictions_go_through_what_was_measured_together_and_fall_in_proportion(cost, kld):
    assert sensitivity().predicted(cost) == pytest.approx(kld)


def test_predictions_rise_with_the_sum_beyond_all_that_was_measured():
    seen = [sensitivity().predicted(10.0**k) for k in range(-6, 2)]
    assert seen == sorted(seen)
    assert seen[-1] > 10


def test_a_noisy_pair_of_joint_measurements_does_not_turn_the_order_round():
    odd = sensitivity(joint=((0.01, 0.012), (0.011, 0.008), (0.1, 0.1)))
    seen = [odd.predicted(x / 1000) for x in range(1, 200)]
    assert seen == sorted(seen)


def test_what_is_saved_is_read_back(tmp_path):
    path = tmp_path / "s.json"
    path.write_bytes(sensitivity().save_as())
    assert load_sensitivity(path) == sensitivity()


@pytest.mark.parametrize(
    "change",
    [
        {"errors": {"a": {"Q8_0": -1}}},
        {"errors": {"a": {"Q8_0": float("nan")}}},
        {"joint": [[1, float("inf")]]},
        {"groups": [{"name": "g", "tensors": [], "error": 1, "kld": 1}]},
        {"more": 1},
        {"digest": None},
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(json.loads(sensitivity().save_as()) | change))
    with pytest.raises(UsageError, match="holds no sensitivities"):
        load_sensitivity(path)
