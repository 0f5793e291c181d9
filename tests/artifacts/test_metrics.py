from finemill.artifacts.metrics import is_total, metrics_of, model_metric, stderr_of

METRICS = {"eval/rows": 8, "eval/base/loss": 2.0, "eval/tuned/loss": 1.0, "eval/tuned/math/loss": 0.5}


def test_metrics_of_a_model_lose_its_name() -> None:
    assert metrics_of(METRICS, "tuned") == {"loss": 1.0, "math/loss": 0.5}
    assert model_metric("base", "loss") in METRICS


def test_totals_are_over_all_rows_and_no_errors() -> None:
    assert [name for name in METRICS if not is_total(name)] == ["eval/tuned/math/loss"]
    assert not is_total(stderr_of("eval/base/loss"))
    assert is_total("gguf/q4_k_m/kl")
