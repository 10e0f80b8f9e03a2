"""Recipes: which settings are read, their types, and which are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "yaml", "torchvision"):
    pytest.importorskip(needed)

import hypothesis  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llave import runs, trainer_settings, yaml12  # noqa: E402
from llave.mmeb import TASKS  # noqa: E402
from llave.recipe import SECTIONS, read_recipe  # noqa: E402
from llave.trainer_settings import INEFFECTIVE  # noqa: E402
from llave.training import trainer_arguments  # noqa: E402

ROOT = Path(__file__).parents[2]
SHARED = "llave"  # the base of the paper's recipes. It has no backbone
RECIPES = sorted({p.stem for p in (ROOT / "llave" / "recipes").glob("*.yaml")} - {SHARED})
WHOLE = "model: {backbone: x}\ndata: {train: x}\nloss: {alpha: 4}\ntrainer: {output_dir: x}\n"


@pytest.mark.parametrize("name", RECIPES)
def test_our_recipes_are_whole(name: str) -> None:
    recipe = read_recipe(name)
    assert set(recipe) == set(SECTIONS)
    assert recipe["loss"]["scale"] == 50.0
    assert recipe["loss"]["alpha"] == 9.0
    if name != "tiny":
        # MMEB's training subsets have the names of its evaluation tasks, with one exception.
        known = [task.replace("ImageNet-1K", "ImageNet_1K") for task in TASKS]
        assert recipe["data"]["subsets"] == [
            name for name, task in zip(known, TASKS.values(), strict=True) if task.in_distribution
        ]


def test_the_shared_recipe_lacks_a_backbone() -> None:
    with pytest.raises(ValueError, match="needs one of backbone and scratch; it has neither"):
        read_recipe(SHARED)
    recipe = read_recipe(SHARED, ["--model.backbone", "x", "--trainer.output_dir", "x"])
    assert recipe["data"] == read_recipe("llave-0.5b")["data"]


def write(folder: Path, **recipes: str) -> Path:
    """Write files with these names and texts. Returns the last one's path."""
    for name, text in recipes.items():
        path = folder / f"{name}.yaml"
        path.write_text(text)
    return path


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path, first=WHOLE.replace("backbone: x", "backbone: x, frozen: vision"))
    write(tmp_path / "below", second="base: ../first.yaml\nloss: {scale: 20}\nmodel:\n")
    third = write(
        tmp_path, third="base: below/second.yaml\nmodel: {frozen: null}\nloss: {alpha: 5}"
    )
    recipe = read_recipe(str(third), ["--trainer.seed", "3"])
    assert recipe["loss"] == SECTIONS["loss"] | {"scale": 20.0, "alpha": 5.0}
    assert recipe["model"] == SECTIONS["model"] | {"backbone": "x"}
    assert recipe["trainer"] == {"output_dir": "x", "seed": 3}
    of_ours = write(tmp_path, ours="base: llave-7b\ndata: {subsets: [MSCOCO]}")
    ours = read_recipe("llave-7b")
    assert read_recipe(str(of_ours)) == ours | {"data": ours["data"] | {"subsets": ["MSCOCO"]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: 5", r"base=5 of .*mine\.yaml is no text; expected the name of one of our recipes"),
        ("base:", r"base=None of .*mine\.yaml is no text"),
        ("base: [llave]", r"base=\['llave'\] of .*mine\.yaml is no text"),
        ("base: huge", r"base='huge' of .*mine\.yaml: no recipe 'huge'; there are llave, llave-0"),
        ("base: no.yaml", r"base='no\.yaml' of .*mine\.yaml: no file '.*no\.yaml'"),
        ("base: folder.yaml", r"folder\.yaml is no file"),
        (
            "base: mine.yaml",
            r"base='mine\.yaml' of .* leads back: .*mine\.yaml -> mine\.yaml; take",
        ),
        ("base: there.yaml", r"base='./mine\.yaml' of .*there\.yaml leads back: .*mine\.yaml -> "),
        ("base: wrong.yaml", r"loss\.alhpa of .*wrong\.yaml is no setting"),
        ("base: typed.yaml", r"loss\.alpha='nine' of .*typed\.yaml is refused"),
        ("base: list.yaml", r"section loss of .*list\.yaml is \[\]; expected settings"),
        ("base: tiny\nbase: llave", "base stands twice"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "folder.yaml").mkdir()
    others = {
        "there": "base: ./mine.yaml",
        "wrong": "loss: {alhpa: 5}",
        "typed": "loss: {alpha: nine}",
        "list": "loss: []",
    }
    mine = write(tmp_path, **others, mine=text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_recipe(str(mine))


def test_a_run_keeps_the_settings_of_a_base(tmp_path: Path) -> None:
    mine = write(tmp_path, first=WHOLE, mine="base: first.yaml\nloss: {scale: 20}")
    run = tmp_path / "run"
    runs.record(run, read_recipe(str(mine)), rows={"x": 8})
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    said = json.loads((run / "run.json").read_text())
    assert (said["loss.alpha"], said["loss.scale"]) == (4.0, 20.0)
    assert "base" not in said
    write(tmp_path, first=WHOLE.replace("alpha: 4", "alpha: 5"))
    with pytest.raises(ValueError, match=r"loss\.alpha is 4\.0 there and 5\.0 here"):
        runs.check(run, read_recipe(str(mine)))


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_printed_reads_back(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(name, ["--loss.alpha", "5"])
    printed = write(tmp_path, printed=yaml12.dump(recipe))
    assert read_recipe(str(printed)) == recipe
    assert yaml12.load(printed.read_text(), name).keys() == SECTIONS.keys()


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
LOOKALIKES = st.sampled_from(
    ["2e-5", "no", "1:30", "010", "1_0", "null", "~", ".inf", "<<", "2020-01-01"]
)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.recursive(
        PLAIN | LOOKALIKES,
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | LOOKALIKES, inner),
        max_leaves=8,
    )
)
def test_every_value_is_written_as_it_is_read(value: Any) -> None:
    found = yaml12.load(yaml12.dump(value), "it")
    assert found == value
    assert type(found) is type(value)


def test_overrides_are_read_as_yaml() -> None:
    recipe = read_recipe("tiny", ["--loss.alpha", "0", "--trainer.learning_rate", "2.0e-5"])
    assert recipe["loss"]["alpha"] == 0
    assert recipe["trainer"]["learning_rate"] == 2e-5
    assert read_recipe("tiny", ["--model.frozen", "null"])["model"]["frozen"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--loss.alhpa", "5"], "loss.alhpa of tiny is no setting; there are scale, alpha"),
        (["--optim.lr", "5"], "section 'optim' of tiny is none of model, data, loss, trainer"),
        (["--alpha", "5"], "'--alpha' is no override; expected --section.setting"),
        (["--loss.alpha"], "overrides come in pairs"),
        (["--model.backbone", "x"], "needs one of backbone and scratch"),
        (["--data.train", "null"], "data.train of tiny is missing"),
    ],
)
def test_what_a_recipe_may_not_say(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe("tiny", overrides)
    with pytest.raises(FileNotFoundError, match=r"no recipe 'huge'; there are llave, llave-0\.5b"):
        read_recipe("huge")


@pytest.mark.parametrize(
    ("setting", "written", "value"),
    [
        ("trainer.learning_rate", "2e-5", 2e-5),
        ("trainer.learning_rate", "'2e-5'", 2e-5),
        ("trainer.weight_decay", "1E-2", 0.01),
        ("trainer.warmup_steps", ".03", 0.03),
        ("trainer.eval_strategy", "no", "no"),
        ("trainer.save_strategy", "epoch", "epoch"),
        ("trainer.use_cpu", "yes", True),
        ("trainer.fsdp", "true", True),
        ("trainer.report_to", "[tensorboard]", ["tensorboard"]),
        ("trainer.lr_scheduler_kwargs", "{min_lr: 1e-6}", {"min_lr": 1e-6}),
        ("loss.alpha", "9e0", 9.0),
        ("loss.alpha", "5", 5.0),
        ("loss.mini_batch_size", "4", 4),
        ("data.cap", "5e4", 50_000),
        ("data.cap", "50_000", 50_000),
        ("data.subsets", "[no, 1:30, 2e-5x]", ["no", "1:30", "2e-5x"]),
        ("model.pinpoints", "[[32, 64]]", [[32, 64]]),
        ("model.scratch", "{text: {rms_norm_eps: 1e-6}}", {"text": {"rms_norm_eps": 1e-6}}),
        ("model.lora", "{r: 8, lora_dropout: 1e-1}", {"r": 8, "lora_dropout": 0.1}),
    ],
)
def test_settings_have_their_types(
    tmp_path: Path, setting: str, written: str, value: object
) -> None:
    section, name = setting.split(".")
    # The file and the command line give the same values.
    file = tmp_path / "mine.yaml"
    lines = {section: f"  {name}: {written}"}
    lines["data"] = "  train: x\n" + lines.get("data", "")
    lines["trainer"] = "  output_dir: x\n" + lines.get("trainer", "")
    lines.setdefault("model", "")
    if name != "scratch":
        lines["model"] += "\n  backbone: x"
    file.write_text("\n".join(f"{key}:\n{text}" for key, text in lines.items()))
    for recipe in (read_recipe(str(file)), read_recipe("tiny", [f"--{setting}", written])):
        found = recipe[section][name]
        assert found == value
        assert type(found) is type(value)
        assert read_recipe(str(write(tmp_path, printed=yaml12.dump(recipe)))) == recipe


@pytest.mark.parametrize(
    ("setting", "written", "message"),
    [
        ("loss.alpha", "nine", "should be a valid number"),
        ("loss.alpha", "-1", "greater than or equal to 0"),
        ("loss.alpha", ".nan", "should be a finite number"),
        ("loss.alpha", "true", "should be a valid number"),
        ("loss.alpha", "null", "should be a valid number"),
        ("loss.scale", "0", "greater than 0"),
        ("loss.mini_batch_size", "0", "greater than 0"),
        ("loss.backend", "fast", "should be 'auto', 'triton', 'cuda' or 'torch'"),
        ("data.batch_size", "2.5", "should be a valid integer"),
        ("data.batch_size", "0", "greater than 0"),
        ("data.subsets", "plus", "should be a valid list"),
        ("data.subsets", "[]", "at least 1 item"),
        ("data.subsets", "[a, a]", "repeats a"),
        ("data.on_error", "ignore", "should be 'raise' or 'skip'"),
        ("data.homogeneous", "2", "should be a valid boolean"),
        ("data.held_out", "8", "no effect without an evaluation"),
        ("model.dtype", "half", "should be 'float32'"),
        ("model.pinpoints", "[[32]]", "at least 2 items"),
        ("model.frozen", "''", "at least 1 character"),
        ("model.scratch", "{vocabulary: 100}", "greater than or equal to 261"),
        ("model.scratch", "{tile: 20}", "tile=20 must be a multiple of patch=8"),
        ("model.scratch", "{sed: 1}", "sed is no setting"),
        ("model.scratch", "{vision: {layers: 3}}", "vision.layers is no setting of Siglip"),
        ("model.scratch", "{vision: {patch_size: 3}}", "patch_size follows from the other"),
        ("model.scratch", "{text: {hidden_size: a}}", "expected int, got str"),
        ("model.scratch", "{text: {hidden_size: 30}}", "must be a multiple of num_attention_heads"),
        ("model.lora", "{rank: 8}", "rank is no setting"),
        ("model.lora", "{r: many}", "should be a valid integer"),
        ("trainer.weight_decay", "-1", "must not be negative"),
        ("trainer.adam_beta1", "1", "less than 1"),
        ("trainer.max_steps", "0", "at least 1, or -1"),
        ("trainer.num_train_epochs", "0", "greater than 0"),
        ("trainer.gradient_accumulation_steps", "0", "greater than 0"),
        ("trainer.eval_strategy", "stpes", "should be 'no', 'steps' or 'epoch'"),
        ("trainer.eval_strategy", "steps", "needs pairs to evaluate on; set data.held_out"),
        ("trainer.lr_scheduler_type", "cos", "should be 'linear', 'cosine'"),
        ("trainer.seed", "null", "should be a valid integer"),
        ("trainer.batch_sampler", "group_by_label", "needs labels of classes"),
        ("trainer.run_name", "5", "in quotes"),
        ("trainer.save_steps", "0", "greater than 0"),
        ("trainer.save_total_limit", "0", "greater than 0"),
        ("trainer.data_seed", "-1", "greater than or equal to 0"),
        ("trainer.seed", "4294967296", "less than 4294967296"),
        ("trainer.log_level", "loud", "should be 'detail', 'debug'"),
        ("trainer.report_to", "[paper]", "should be 'all', 'none'"),
        ("trainer.ddp_backend", "wires", "should be 'nccl', 'gloo'"),
        ("trainer.learning_rate_mapping", "{'[': 1e-5}", "valid regular expression"),
        ("trainer.learning_rate_mapping", "{vision: -1}", "greater than or equal to 0"),
        ("trainer.lr_scheduler_kwargs", "'{'", "should be a valid dictionary"),
        ("trainer.eval_steps", "5", "no effect with trainer.eval_strategy=no"),
        ("trainer.metric_for_best_model", "x", "nothing asks which model is best"),
        ("trainer.greater_is_better", "true", "nothing asks which model is best"),
        ("trainer.optim_target_modules", "x", "no effect without a galore or apollo optimizer"),
        ("trainer.eval_delay", "2", "no effect without trainer.eval_strategy"),
        ("trainer.dataloader_persistent_workers", "true", "without trainer.dataloader_num_workers"),
        ("trainer.gradient_checkpointing_kwargs", "{a: 1}", "trainer.gradient_checkpointing or"),
        ("trainer.hub_model_id", "x", "no effect without trainer.push_to_hub"),
        *((f"trainer.{name}", "1", "has no effect") for name in INEFFECTIVE),
    ],
)
def test_a_wrong_value_names_its_setting(setting: str, written: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        read_recipe("tiny", [f"--{setting}", written])
    assert setting in str(error.value)
    assert message in str(error.value)


def test_every_setting_has_a_type(tmp_path: Path) -> None:
    """Each setting refuses an object that fits no type."""
    file = tmp_path / "mine.yaml"
    file.write_text("model: {backbone: x}\ndata: {train: x}\ntrainer: {output_dir: x}")
    for section, settings in SECTIONS.items():
        for setting in settings:
            overrides = [f"--{section}.{setting}", "[[[{}]]]"]
            with pytest.raises(ValueError, match=rf"{section}\.{setting}"):
                read_recipe(str(file), overrides)


def test_settings_that_need_others() -> None:
    evaluated = ["--data.held_out", "8", "--trainer.eval_strategy", "steps"]
    for best in (
        ["--trainer.load_best_model_at_end", "true"],
        ["--trainer.save_strategy", "best"],
        ["--trainer.lr_scheduler_type", "greedy"],
        # transformers takes a greater value as better by default. A smaller overlap is better.
        ["--trainer.save_strategy", "best", "--trainer.metric_for_best_model", "x"],
    ):
        with pytest.raises(ValueError, match=r"trainer\.greater_is_better must say which"):
            read_recipe("tiny", evaluated + best)
    settings = ["--trainer.metric_for_best_model", "x", "--trainer.greater_is_better", "false"]
    assert read_recipe("tiny", [*evaluated, *settings, "--trainer.save_strategy", "best"])
    robin = ["--trainer.multi_dataset_batch_sampler", "round_robin"]
    assert read_recipe("tiny", robin)
    with pytest.raises(ValueError, match=r"no effect where data\.homogeneous is false"):
        read_recipe("tiny", [*robin, "--data.homogeneous", "false"])


def test_a_folder_may_have_no_splits(tmp_path: Path) -> None:
    overrides = ["--data.train", str(tmp_path), "--data.split", "test"]
    with pytest.raises(ValueError, match=r"data\.split='test' has no effect: .* is a folder"):
        read_recipe("tiny", overrides)
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"data\.split='test' has no effect: .* is a folder"):
        read_recipe("tiny", overrides)
    (tmp_path / "GQA").mkdir()
    (tmp_path / "GQA" / "test-00000-of-00001.parquet").touch()
    assert read_recipe("tiny", overrides)
    assert read_recipe("tiny", ["--data.train", "of/thehub", "--data.split", "test"])


def test_sections_and_files_of_another_kind(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for text, message in (
        ("- loss", "holds no sections"),
        ("loss: 5", "section loss of .* is 5; expected settings"),
        ("loss: []", r"section loss of .* is \[\]; expected settings"),
        ("loss: {alpha: 5", "is no YAML"),
        ("loss: {alpha: 5, alpha: 9}", "alpha stands twice"),
        ("loss: {alpha: 5}\nloss: {scale: 20}", "loss stands twice"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(str(file))
    file.write_text("loss: 5")
    with pytest.raises(ValueError, match=r"section loss of .* is 5; expected settings"):
        read_recipe(str(file), ["--loss.alpha", "3"])
    with pytest.raises(ValueError, match=r"--loss\.alpha is no YAML"):
        read_recipe("tiny", ["--loss.alpha", "[5"])


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = "model: {backbone: Modèle}\ndata: {train: x}\ntrainer: {output_dir: x}"
    file.write_text(text, encoding="utf-8-sig")
    assert read_recipe(str(file))["model"]["backbone"] == "Modèle"


def test_lora_needs_peft_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"model\.lora=.* needs peft: pip install peft"):
        read_recipe("tiny", ["--model.lora", "{r: 8}"])


def test_settings_reach_the_trainer(tmp_path: Path) -> None:
    words: dict[str, Any] = {
        "trainer.output_dir": tmp_path / "run",
        "trainer.learning_rate": "2e-5",
        "trainer.save_strategy": "no",
    }
    overrides = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    arguments = trainer_arguments(read_recipe("tiny", overrides))
    assert (arguments.learning_rate, arguments.save_strategy) == (2e-5, "no")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lr_scheduler_kwargs": "{foo: 2}"}, "lr_scheduler_kwargs={'foo': 2} cannot be had here"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_kwargs=None .*num_decay_steps",
        ),
        ({"optim": "lomo"}, "optim='lomo' cannot be had here: .*lomo"),
        (
            {"optim_args": "momentum=0.9"},
            "optim_args='momentum=0.9' has no effect on trainer.optim",
        ),
        ({"report_to": "swanlab"}, r"report_to=\['swanlab'\] cannot be had here: .*swanlab"),
    ],
)
def test_classes_of_the_trainer_are_tried_before_the_data_are_read(
    overrides: dict[str, str], message: str
) -> None:
    words = [word for key, value in overrides.items() for word in (f"--trainer.{key}", value)]
    with pytest.raises(ValueError, match=message):
        trainer_arguments(read_recipe("tiny", words))


def test_an_optimizer_takes_its_arguments() -> None:
    words = ["--trainer.optim", "sgd", "--trainer.optim_args", "momentum=0.9"]
    assert trainer_arguments(read_recipe("tiny", words)).optim_args == "momentum=0.9"


def test_a_trainer_without_some_of_the_settings_is_checked_too() -> None:
    """Versions of transformers have different settings."""
    trainer_settings.check({}, {"held_out": 0, "homogeneous": True}, {})
