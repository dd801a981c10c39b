"""The command line: what is refused is refused with exit code 2, one short message, and nothing left behind."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_run import call, command, corpus

from qat import entry, recipes, run_folder
from qat.errors import UserError


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The message of a refused command line."""
    assert entry.main(list(argv)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("argv", [[], ["recipe=no_such"], ["seed=3"]])
def test_recipes_are_listed(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    message = refused(capsys, *argv)
    for recipe in recipes.recipes():
        assert recipe.name in message
        assert recipe.about in message
        assert recipe.time in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "no key sed; did you mean seed"),
        ("trainer.max_step=1", "no key trainer.max_step; did you mean trainer.max_steps"),
        ("model=gpt3", "no model=gpt3; choose one of "),
        ("optimizer.lr=[1,", "cannot read 'optimizer.lr=[1,'"),
        ("+optimizer.lrr=1", "no key optimizer.lrr; did you mean lr"),
        ("optimizer.lr=quick", "optimizer.lr='quick' does not fit"),
        ("seed=1,2", "seed"),
        ("seed=${nothing}", "nothing"),
        ("data.block_size=0", "data.block_size=0"),
        (f"data.cache_dir={__file__}/x", "data.cache_dir="),
        (f"run_dir={__file__}/x", "run_dir="),
        ("data.workers=-1", "data.workers=-1"),
        ("model=gpt2_mini data.block_size=1025", "more than the 1024 positions"),
        ("evaluation.every_n_steps=0", "evaluation.every_n_steps=0"),
        ("evaluation.windows=0", "evaluation.windows=0"),
        ("evaluation.split=tets", "evaluation.split='tets' does not fit"),
        ("checkpoint.every_n_steps=0", "checkpoint.every_n_steps=0"),
        ("calibration_batches=-1", "calibration_batches=-1"),
        ("quant_start_step=-1", "quant_start_step=-1"),
        ("seed=-1", "seed=-1"),
        ("optimizer.lr=-1", "optimizer.lr=-1"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]"),
        ("trainer.max_steps=-1", "trainer.max_steps"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1"),
        ("trainer.devices=0", "Lightning refuses the trainer.* settings"),
        *((f"~{part}", f"a run needs {part}, a mapping") for part in ("model", "data", "trainer", "scheme")),
        *((f"~{part}", f"lacks {part}") for part in ("export", "optimizer", "task")),
        ("~scheme.rules", "a run needs scheme, a mapping with rules"),
        ("model._target_=[1]", "model._target_=[1] is not a class or a function"),
        ("scheme.rules=[3]", "scheme.rules[0]=3 does not fit: Rule is expected"),
        ("model=null", "model=null names nothing"),
        (f"run_dir={'a' * 300}", "File name too long"),
        ("target=null export=foo scheme=int4_g32", "no export target 'foo'"),
        ("target=llama_cpp export=hf", "export=hf contradicts target=llama_cpp"),
        ("target=llama_cpp export=hf+gguf", "export=hf contradicts target=llama_cpp"),
        ("target=llama_cpp scheme=int8_channel", "scheme=int8_channel contradicts target=llama_cpp"),
    ],
)
def test_wrong_input_is_named(
    capsys: pytest.CaptureFixture[str], in_an_empty_folder: Path, override: str, message: str
) -> None:
    assert message in refused(capsys, "recipe=pretrain_gpt2_mini", *override.split())
    assert list(in_an_empty_folder.iterdir()) == []


def test_a_name_that_no_file_system_has(capsys: pytest.CaptureFixture[str], in_an_empty_folder: Path) -> None:
    for given in (["recipe=quickstart", f"model.path=/{'a' * 300}"], [f"resume=/{'a' * 300}"]):
        assert "File name too long; give another path" in refused(capsys, *given)


def test_a_typo_in_a_recipe_file_is_refused(
    capsys: pytest.CaptureFixture[str], in_an_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_an_empty_folder / "bad.yaml").write_text("# Bad.\noptimizer:\n  warm_up_steps: 3\nsede: 1\n")
    monkeypatch.setattr(recipes, "RECIPES", in_an_empty_folder)
    assert "no key sede; did you mean seed" in refused(capsys, "recipe=bad")


def test_a_broken_recipe_file_is_named(
    capsys: pytest.CaptureFixture[str], in_an_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_an_empty_folder / "torn.yaml").write_text("trainer: {max_steps: 3\n")
    monkeypatch.setattr(recipes, "RECIPES", in_an_empty_folder)
    assert "torn.yaml" in refused(capsys, "recipe=torn")


def test_a_scheme_without_meaning_is_refused(
    capsys: pytest.CaptureFixture[str], in_an_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = "{_target_: qat.scheme.QuantSpec, qtype: int9}"
    scheme = f"{{_target_: qat.scheme.Scheme, weight: {weight}}}"
    (in_an_empty_folder / "odd.yaml").write_text(
        f"# Odd.\ndefaults:\n  - override /scheme: none\nscheme:\n  rules:\n"
        f"    - {{_target_: qat.scheme.Rule, scheme: {scheme}}}\n"
    )
    monkeypatch.setattr(recipes, "RECIPES", in_an_empty_folder)
    assert "error: scheme.rules[0].scheme.weight: qtype is 'int9'" in refused(capsys, "recipe=odd")


def test_a_working_folder_that_cannot_be_written_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "execute", lambda config: pytest.fail("work was begun"))
    monkeypatch.chdir("/proc")  # where root cannot write either
    message = refused(capsys, "recipe=pretrain_gpt2_mini")
    assert message.startswith("error: run_dir=/proc/outputs cannot be written: /proc: ")


def test_resume_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "resume=nowhere is no run folder" in refused(capsys, "resume=nowhere")


def test_a_used_run_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    run_folder.refuse_used(tmp_path)
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match="resume="):
        run_folder.refuse_used(tmp_path)


def test_latest_points_at_the_newest_default_folder(in_an_empty_folder: Path) -> None:
    paths = []
    for _ in range(2):
        path = run_folder.default("some recipe")
        run_folder.create(path, {"seed": 1})
        paths.append(path)
    assert paths[0] != paths[1]
    assert (Path("outputs") / "some recipe" / "latest").resolve() == paths[1].resolve()
    assert run_folder.read(paths[1]) == {"seed": 1, "run_dir": str(paths[1])}


def test_resume_of_latest_goes_on_in_the_folder_behind_it(
    in_an_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_folder.default("name")
    parts = {name: {"_target_": "x"} for name in ("model", "data", "trainer")}
    config = {"seed": 1, **parts, "scheme": {"rules": []}, "export": []}
    run_folder.create(path, config)
    latest = path.with_name("latest")

    def execute(config: dict[str, object]) -> None:
        run_folder.create(Path(str(config["run_dir"])), config)

    monkeypatch.setattr(entry, "execute", execute)
    assert entry.main([f"resume={latest}"]) == 0
    assert latest.resolve() == path.resolve()
    assert run_folder.read(latest) == {**config, "run_dir": str(path)}
    (path / "config.yaml").write_text("seed: 1")
    assert entry.main([f"resume={path}"]) == 2


def test_a_run_leaves_the_folder_of_the_contract_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = corpus(tmp_path / "my code")
    run = tmp_path / "it's, (a) run=1 #ü"  # typed like this behind run_dir=, as a shell passes it on
    arguments = ["recipe=pretrain_gpt2_mini", f"run_dir={run}", f"data.root='{library}'", "trainer.max_steps=2"]
    done = call(command(*arguments), tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    expected = {"config.yaml", "report.json", "report.html", "metrics.csv", "checkpoints", "model"}
    assert {path.name for path in run.iterdir()} == expected
    assert "already holds a run" in refused(capsys, *arguments)
    before = (run / "config.yaml").read_bytes()
    assert "which is at step 2: give 2 or more" in refused(capsys, f"resume={run}", "trainer.max_steps=1")
    assert (run / "config.yaml").read_bytes() == before
    longer = call([*command()[:2], f"resume={run}", "trainer.max_steps=3"], tmp_path / "cache")
    assert longer.returncode == 0, longer.stderr
    assert run_folder.read(run)["trainer"]["max_steps"] == 3


def test_a_stand_in_never_replaces_a_path_that_the_user_gave(
    capsys: pytest.CaptureFixture[str], in_an_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    for path in ("model.path=someone/gpt2", "data.path=someone/corpus"):
        message = refused(capsys, "recipe=gpt2_int4", "trainer.max_steps=0", path)
        assert f"{path.partition('=')[2]} is not in the local cache" in message
    assert list(in_an_empty_folder.iterdir()) == []


@pytest.mark.parametrize(("flag", "shown"), [("--help", "recipe: "), ("--cfg=job", "seed: 0")])
def test_hydra_flags_still_work(tmp_path: Path, flag: str, shown: str) -> None:
    done = call([*command()[:2], "recipe=pretrain_gpt2_mini", flag], tmp_path)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_multirun_reports_every_job_that_fails(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--multirun", "recipe=pretrain_gpt2_mini", "data.block_size=-1,0", "data.batch_size=0")
    lines = message.removeprefix("error: ").splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["job 0 (data.block_size=-1)", "job 1 (data.block_size=0)"]
    assert all("is not possible; give a positive number" in line for line in lines)
    message = refused(capsys, "-m", "recipe=pretrain_gpt2_mini", "seed=1,2", "run_dir=here")
    assert message.count("run_dir is one folder, and --multirun needs one for each job") == 2


def test_multirun_runs_each(tmp_path: Path) -> None:
    library = corpus(tmp_path / "library")
    arguments = ["--multirun", "recipe=pretrain_gpt2_mini", f"data.root={library}", "seed=1,2", "trainer.max_steps=0"]
    done = call(command(*arguments), tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    reports = (tmp_path / "outputs" / "pretrain_gpt2_mini").glob("2*/report.json")
    assert sorted(json.loads(report.read_text())["seed"] for report in reports) == [1, 2]
