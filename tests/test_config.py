"""Configuration: what loads, what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_moe.config import Config, ConfigError, MoEConfig, PhaseConfig, RouterConfig
from ep_moe.config_fields import walk
from ep_moe.config_loading import config_from_dict, config_to_dict, load_config
from ep_moe.config_reference import reference_page
from ep_moe.config_training import TrainingConfig

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_load_and_round_trip(path: Path) -> None:
    config = load_config(path)
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config_to_dict(config)))) == config


def test_model_dimensions() -> None:
    deepseek, qwen, mixtral = (
        load_config(ROOT / "configs" / f"{name}.yaml") for name in ("deepseek_v3", "qwen3_235b_a22b", "mixtral_8x7b")
    )
    assert (deepseek.model.hidden_size, deepseek.moe.num_experts, deepseek.moe.top_k) == (7168, 256, 8)
    assert (deepseek.moe.experts.ffn_hidden_size, deepseek.moe.router.routed_scaling_factor) == (2048, 2.5)
    assert (qwen.model.hidden_size, qwen.moe.num_experts, qwen.moe.experts.ffn_hidden_size) == (4096, 128, 1536)
    assert (mixtral.model.hidden_size, mixtral.moe.num_experts, mixtral.moe.top_k) == (4096, 8, 2)


def test_defaults_and_sections_given_in_part() -> None:
    assert config_from_dict({}) == Config()
    config = config_from_dict({"phases": {"decode": {"dispatch_dtype": "fp8"}}})
    assert config.phases.decode == PhaseConfig(dispatch_dtype="fp8", max_tokens_per_rank=128)
    assert config_from_dict({"phases": {"train": {"overlap": ["shared_experts"]}}}).phases.train.overlap == (
        "shared_experts",
    )


def test_overrides_win_and_later_ones_over_earlier(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("moe:\n  top_k: 4\n")
    overrides = ["moe.top_k=3", "moe.top_k=6", "training.learning_rate=1e-2", "data.path=null", "moe.comm=portable"]
    config = load_config(path, overrides)
    assert config.moe.top_k == 6 and config.moe.comm == "portable"
    assert config.training.learning_rate == 0.01 and config.data.path is None


BAD = [
    ("moe.topk=4", "moe.topk = 4: unknown key; did you mean moe.top_k?"),
    ("mo.top_k=4", "mo: unknown key; did you mean moe?"),
    ("moe.router.top_k=4", "moe.router.top_k = 4: unknown key; did you mean moe.top_k?"),
    ("training.adam_bet1a=1", "training.adam_bet1a = 1: unknown key; did you mean training.adam_beta1?"),
    ("moe.routr=null", "moe.routr = null: unknown key; did you mean moe.router?"),
    ("moe.routr.num_groups=2", "moe.routr: unknown key; did you mean moe.router?"),
    ("lr=1", "lr = 1: unknown key; the configuration has data, model, moe, phases, training"),
    ("phases.zzz.mode=normal", "phases.zzz: unknown key; phases has decode, prefill, train"),
    ("data.zzz.x=1", "data.zzz: unknown key; data has path, pattern, sequence_length, validation_fraction"),
    ("moe.comm_timeout_s=1e300", "moe.comm_timeout_s = 1e+300: must be at most 1000000000"),
    (
        "moe.experts={3: 1}",
        "moe.experts.3 = 1: unknown key; moe.experts has activation, backend, ffn_hidden_size, precision, "
        "recompute_activation, wgrad_precision",
    ),
    (
        'moe.experts={"a\\nb": 1}',
        "moe.experts.a b = 1: unknown key; moe.experts has activation, backend, ffn_hidden_size, precision, "
        "recompute_activation, wgrad_precision",
    ),
    ("data.zzzz=1", "data.zzzz = 1: unknown key; data has path, pattern, sequence_length, validation_fraction"),
    ("moe.top_k=two", "moe.top_k = two: must be an integer"),
    ('moe.top_k="2"', 'moe.top_k = "2": must be an integer'),
    ('moe.router.expert_bias="on"', 'moe.router.expert_bias = "on": must be true or false'),
    ("moe.top_k=true", "moe.top_k = true: must be an integer"),
    ("moe.top_k=2.5", "moe.top_k = 2.5: must be an integer"),
    ("moe.top_k=null", "moe.top_k = null: must be an integer"),
    ("moe.top_k=0", "moe.top_k = 0: must be at least 1"),
    ("training.adam_beta1=1.5", "training.adam_beta1 = 1.5: must be at most 1.0"),
    ("training.learning_rate=.nan", "training.learning_rate = nan: must be finite"),
    ("training.learning_rate=-.inf", "training.learning_rate = -inf: must be finite"),
    (f"training.learning_rate={'9' * 400}", "training.learning_rate = inf: must be finite"),
    ("training.learning_rate=true", "training.learning_rate = true: must be a number"),
    ("training.adam_beta2=1", "training.adam_beta2 = 1.0: must be less than 1: nothing new would enter the average"),
    ("training.learning_rate=fast", "training.learning_rate = fast: must be a number"),
    ("moe.router.expert_bias=1", "moe.router.expert_bias = 1: must be true or false"),
    ("data.path=3", "data.path = 3: must be a string or null"),
    ("moe.router.score_function=relu", "moe.router.score_function = relu: must be one of softmax, sigmoid"),
    (
        "phases.train.overlap=[everything]",
        "phases.train.overlap = [everything]: must be a list of shared_experts, wgrad",
    ),
    ("phases.train.overlap=[1]", "phases.train.overlap = [1]: must be a list of shared_experts, wgrad"),
    ("phases.train.overlap=null", "phases.train.overlap = null: must be a list of shared_experts, wgrad"),
    (
        "phases.train.overlap=shared_experts",
        "phases.train.overlap = shared_experts: must be a list of shared_experts, wgrad",
    ),
    (
        "phases.train.overlap=[shared_experts, shared_experts]",
        "phases.train.overlap = [shared_experts, shared_experts]: must name each strategy once",
    ),
    ("moe=3", "moe = 3: must be a section of keys"),
    ("moe=null", "moe = null: must be a section of keys"),
    ("moe.top_k.x=3", "moe.top_k = {'x': 3}: must be an integer"),
    ("moe.top_k", "override moe.top_k: must look like moe.top_k=4"),
    ("=4", "override =4: must look like moe.top_k=4"),
    ("moe..top_k=4", "override moe..top_k=4: must look like moe.top_k=4"),
    (
        "moe={top_k: 2, top_k: 3}",
        "override moe={top_k: 2, top_k: 3}: line 1: key top_k is given twice",
    ),
    ("moe.top_k=2001-13-01", "override moe.top_k=2001-13-01: line 1: 2001-13-01 is not a valid timestamp"),
    ("moe.top_k=[1", "override moe.top_k=[1: line 1: expected ',' or ']', but got '<stream end>'"),
    ("moe.top_k=9", "moe.top_k = 9: must be at most moe.num_experts (8)"),
    (
        "moe.ep_size=3",
        "moe.num_experts = 8: must be divisible by the expert-parallel size (3, key moe.ep_size)",
    ),
    (
        "phases.train={mode: low_latency, max_tokens_per_rank: 8}",
        "phases.train.mode = low_latency: must be normal: low_latency has no backward pass",
    ),
    (
        "phases.prefill.mode=low_latency",
        "phases.prefill.max_tokens_per_rank = null: must be set for low_latency, whose buffers have a fixed size",
    ),
    (
        "moe.router={num_groups: 4, group_topk: 5}",
        "moe.router.group_topk = 5: must be at most moe.router.num_groups (4)",
    ),
    (
        "moe.router.group_topk=2",
        "moe.router.group_topk = 2: must be given together with moe.router.num_groups (here null)",
    ),
    ("moe.router={num_groups: 3, group_topk: 1}", "moe.router.num_groups = 3: must divide moe.num_experts (8)"),
    (
        "moe={top_k: 3, router: {num_groups: 8, group_topk: 2}}",
        "moe.top_k = 3: must be at most the 2 experts of moe.router.group_topk groups",
    ),
    ("moe.router={num_groups: 4, group_topk: 3}", "moe.router.group_topk = 3: must be at most moe.top_k (2)"),
    ("moe.router.expert_bias=true", "moe.router.expert_bias = true: needs moe.router.score_function: sigmoid"),
    (
        "moe.top_k=1",
        "moe.top_k = 1: needs moe.router.pre_softmax: true "
        "(a softmax over one chosen expert is always 1 and has no gradient)",
    ),
    (
        "moe.shared_experts.gate=true",
        "moe.shared_experts.gate = true: needs shared experts: moe.shared_experts.ffn_hidden_size > 0",
    ),
    ("model.hidden_size=130", "model.hidden_size = 130: must be divisible by model.num_attention_heads (4)"),
    ("model.num_query_groups=3", "model.num_query_groups = 3: must divide model.num_attention_heads (4)"),
    ("model.num_dense_layers=3", "model.num_dense_layers = 3: must be at most model.num_layers (2)"),
    ("training.warmup_steps=101", "training.warmup_steps = 101: must be at most training.steps (100)"),
    ("training.micro_batch_size=5", "training.micro_batch_size = 5: must divide training.global_batch_size (16)"),
    (
        "training.min_learning_rate=1",
        "training.min_learning_rate = 1.0: must be at most training.learning_rate (0.001)",
    ),
]


@pytest.mark.parametrize(("override", "message"), BAD, ids=[override for override, _ in BAD])
def test_bad_values_give_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert str(caught.value) == message
    assert len(message.splitlines()) == 1


def test_fp8_needs_whole_blocks() -> None:
    with pytest.raises(ConfigError, match=r"phases.prefill.dispatch_dtype = fp8: needs model.hidden_size \(192\)"):
        load_config(None, ["model.hidden_size=192", "phases.prefill.dispatch_dtype=fp8"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe: [1", "line 1: expected"),
        ("moe:\n  top_k: 1\n  top_k: 2\n", "line 3: key top_k is given twice"),
        ("moe: {top_k: 2}\nmodel: {}\nmoe: {top_k: 3}\n", "line 3: key moe is given twice"),
        ("moe:\n  [top_k]: 1\n", "line 2: a key must be a name"),
        ("moe:\n  top_k: 0x_\n", "line 2: 0x_ is not a valid int"),
        ("moe:\n\ttop_k: 1\n", "line 2: found character"),
        ("moe: {}\n# \x01\n", "line 2: character 0x01 is not allowed"),
        ("[" * 3000, "nested too deeply"),
        ("- a\n", "must hold sections of keys"),
        ("just text", "must hold sections of keys, got just text"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "nothing.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: cannot be read \(not UTF-8 text\)"):
        load_config(tmp_path / "bytes.yaml")


def test_an_override_does_not_reach_other_sections_through_an_alias(tmp_path: Path) -> None:
    (tmp_path / "alias.yaml").write_text("phases:\n  train: &same {num_sms: 4}\n  prefill: *same\n")
    phases = load_config(tmp_path / "alias.yaml", ["phases.train.num_sms=8"]).phases
    assert (phases.train.num_sms, phases.prefill.num_sms) == (8, 4)


def test_merged_keys_can_be_overridden(tmp_path: Path) -> None:
    text = "phases:\n  train: &same {num_sms: 4, dispatch_dtype: fp8}\n  prefill: {<<: *same, num_sms: 2}\n"
    (tmp_path / "merge.yaml").write_text(text)
    phases = load_config(tmp_path / "merge.yaml").phases
    assert (phases.prefill.num_sms, phases.prefill.dispatch_dtype) == (2, "fp8")


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == Config()


@pytest.mark.parametrize(
    "build",
    [
        lambda: MoEConfig(top_k=0),
        lambda: RouterConfig(score_function="relu"),  # type: ignore[arg-type]
        lambda: TrainingConfig(steps=1.5),  # type: ignore[arg-type]
    ],
)
def test_sections_built_in_code_are_checked_too(build: Any) -> None:
    with pytest.raises(ConfigError, match="must be"):
        build()


def _slips(name: str) -> set[str]:
    """``name`` with one letter dropped, or with two neighbours swapped."""
    dropped = {name[:place] + name[place + 1 :] for place in range(len(name))}
    return dropped | {name[:place] + name[place : place + 2][::-1] + name[place + 2 :] for place in range(len(name))}


LEAVES = [path for path, *_ in walk(Config())]
# Every slip with the keys it may stand for: adam_beta is as near to adam_beta1 as to adam_beta2.
MISSPELT: dict[str, set[str]] = {}
for leaf in LEAVES:
    section, _, leaf_name = leaf.rpartition(".")
    for slip in _slips(leaf_name):
        MISSPELT.setdefault(f"{section}.{slip}", set()).add(leaf)
for leaf in LEAVES:
    MISSPELT.pop(leaf, None)


@settings(deadline=None)
@given(st.sampled_from(sorted(MISSPELT)))
def test_a_misspelt_key_is_answered_with_the_real_one(misspelt: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"{misspelt}=1"])
    real = MISSPELT[misspelt]
    assert str(caught.value) in {f"{misspelt} = 1: unknown key; did you mean {path}?" for path in real}


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference_page(), "run: python -m ep_moe.config_reference > docs/configuration.md"


def test_every_key_is_documented() -> None:
    for path, _, _, field in walk(Config()):
        doc = field.metadata["doc"]
        assert doc.endswith(".") and len(doc) > 10 and "\n" not in doc, path
