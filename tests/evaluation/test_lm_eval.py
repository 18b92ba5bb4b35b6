"""Tasks of lm-evaluation-harness have the numbers of the harness's own Hugging Face backend, for any size of batches.

tests/data/lm_eval has three small tasks, a tokenizer of one token a character, and what that backend gives for the
model `qwen3_qk_norm` of tests/data/huggingface: in float32, a request at a time, max_length=256, add_bos_token=False.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.evaluation.conftest import b
from ttt_e2e.cli import main
from ttt_e2e.evaluation.lm_eval import LMEval, summarise

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "lm_eval" / "golden.json").read_text())
TASKS = "local_choice,local_rolling,local_generation"
# Sums of up to 1300 log-likelihoods in float32, added in other orders.
CLOSE = {"rel": 2e-6, "abs": 2e-4}


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    """The harness; what it reads of data is cached in a directory of the tests."""
    lm_eval, datasets = pytest.importorskip("lm_eval"), pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield lm_eval


@pytest.fixture(scope="session")
def tasks_dir(harness, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    for path in (DATA / "lm_eval" / "tasks").iterdir():
        (directory / path.name).write_text(path.read_text().replace("DIRECTORY", str(DATA / "lm_eval")))
    return directory


def evaluate(workdir, output, tasks_dir, *flags, tasks=TASKS):
    """Runs the command; returns the result, and the records by task, document and choice."""
    paths = [f"--workdir={workdir}", f"--output={output}", f"--lm_eval_tasks_dir={tasks_dir}"]
    assert main(["evaluate", *paths, f"--lm_eval={tasks}", *flags]) == 0
    result = json.loads((output / "lm_eval.json").read_text())
    lines = [json.loads(line) for line in (output / "lm_eval.jsonl").read_text().splitlines()[1:]]
    records = {}
    for line in lines:
        place = (line["task"], line["document"], line["choice"], line["learn"])
        records.setdefault(place, []).append(line)
    return result, records


def metrics_of(result, suffix="") -> dict:
    return {
        (task["task"], metric["metric"]): metric[f"value{suffix}"]
        for task in result["tasks"]
        for metric in task["metrics"]
    }


# ------------------------------------------------------------------------------------------------ the numbers of others


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    pytest.importorskip("tokenizers")
    model, run = tmp_path_factory.mktemp("model") / "model", tmp_path_factory.mktemp("imported") / "run"
    shutil.copytree(DATA / "huggingface" / "qwen3_qk_norm" / "model", model)
    for path in (DATA / "lm_eval" / "tokenizer").iterdir():
        shutil.copyfile(path, model / path.name)
    assert main(["import", "--source=huggingface", f"--checkpoint={model}", f"--output={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def evaluate_imported(imported, tasks_dir, tmp_path_factory):
    def run(*flags, **options):
        size = "--config.inner.mini_batch_size=256"  # of a model that does not learn: tokens that are run at once
        return evaluate(imported, tmp_path_factory.mktemp("out"), tasks_dir, size, *flags, **options)

    return run


AS_THEIRS = ("--lm_eval_max_length=256", "--nolm_eval_add_bos_token")


def test_the_numbers_are_those_of_the_hugging_face_backend(evaluate_imported):
    result, records = evaluate_imported(*AS_THEIRS)
    ours = metrics_of(result)
    for task, theirs in GOLDEN["results"].items():
        names = [name.removesuffix(",none") for name in theirs if name != "sample_len"]
        assert names == [metric for of_task, metric in ours if of_task == task]
        for name in names:
            # A perplexity is the exponential of a sum over documents, divided by the number of words.
            assert ours[task, name] == pytest.approx(theirs[f"{name},none"], rel=5e-6)
    for document, sample in enumerate(GOLDEN["samples"]["local_choice"]):
        for choice, [[loglikelihood, is_greedy]] in enumerate(sample["resps"]):
            [record] = records["local_choice", document, choice, True]
            assert record["loglikelihood"] == pytest.approx(loglikelihood, **CLOSE)
            assert record["is_greedy"] == is_greedy
    for document, sample in enumerate(GOLDEN["samples"]["local_rolling"]):
        windows = records["local_rolling", document, 0, True]
        [[loglikelihood]] = sample["resps"]
        assert sum(record["loglikelihood"] for record in windows) == pytest.approx(loglikelihood, **CLOSE)
    for document, sample in enumerate(GOLDEN["samples"]["local_generation"]):
        [record] = records["local_generation", document, 0, True]
        assert [[record["text"]]] == sample["resps"]
    assert {len(windows) for (task, *_), windows in records.items() if task == "local_rolling"} > {1}
    assert all("num_requests" not in task for task in result["tasks"])  # it has no fast weights


def test_bos_before_every_request_is_seen(evaluate_imported):
    _, records = evaluate_imported("--lm_eval_max_length=256", "--lm_eval_limit=6", tasks="local_choice")
    differences = [
        abs(records["local_choice", document, choice, True][0]["loglikelihood"] - loglikelihood)
        for document, sample in enumerate(GOLDEN["samples"]["local_choice"][:6])
        for choice, [[loglikelihood, _]] in enumerate(sample["resps"])
    ]
    assert min(differences) > 2e-3  # ten times the tolerance


def test_a_document_that_is_not_cut_is_seen(evaluate_imported):
    result, records = evaluate_imported(tasks="local_rolling")
    expected = GOLDEN["results"]["local_rolling"]["bits_per_byte,none"]
    assert abs(metrics_of(result)["local_rolling", "bits_per_byte"] / expected - 1) > 1e-4
    for document, sample in enumerate(GOLDEN["samples"]["local_rolling"]):
        [record] = records["local_rolling", document, 0, True]
        [[loglikelihood]] = sample["resps"]
        length = len(json.loads((DATA / "lm_eval" / "rolling.jsonl").read_text().splitlines()[document])["text"])
        assert (record["loglikelihood"] == pytest.approx(loglikelihood, **CLOSE)) == (length <= 256)


# ------------------------------------------------------------------------------------------- a model with fast weights


@pytest.fixture(scope="module")
def whole(workdir, tasks_dir, tmp_path_factory):
    """Result, records and directory of a model that learns, with and without learning."""
    output = tmp_path_factory.mktemp("whole")
    return *evaluate(workdir, output, tasks_dir, "--lm_eval_limit=5", "--lm_eval_learn=both"), output


@pytest.mark.parametrize("batch_size", [1, 7])
def test_results_are_the_same_for_any_batch_size(whole, workdir, tasks_dir, tmp_path, batch_size):
    flags = ["--lm_eval_limit=5", f"--config.eval.batch_size={batch_size}"]
    result, records = evaluate(workdir, tmp_path, tasks_dir, *flags)
    assert records.keys() == {key for key in whole[1] if key[-1]}
    for key, [record] in records.items():
        [expected] = whole[1][key]
        for name in ("text", "is_greedy", "inner_steps"):
            assert record.get(name) == expected.get(name)
        if "loglikelihood" in expected:
            assert record["loglikelihood"] == pytest.approx(expected["loglikelihood"], rel=1e-5)
    assert metrics_of(result) == pytest.approx(metrics_of(whole[0]), rel=1e-4)


def test_learning_is_seen_and_counted(whole):
    result, records, _ = whole
    for (task, document, choice, learn), [record] in records.items():
        if learn and task != "local_generation":
            [without] = records[task, document, choice, False]
            assert without["inner_steps"] == 0
            assert (abs(record["loglikelihood"] - without["loglikelihood"]) > 1e-3) == (record["inner_steps"] > 0)
    for task, requests in zip(result["tasks"], (4 * 5, 5, 5)):
        assert task["num_documents"] == 5
        assert task["num_requests"] == task["num_requests_learned_in"] == requests
    [rolling] = [task for task in result["tasks"] if task["task"] == "local_rolling"]
    [metric] = [metric for metric in rolling["metrics"] if metric["metric"] == "bits_per_byte"]
    assert metric["value"] != metric["value_without_learning"]


def test_a_killed_evaluation_goes_on_to_the_same_result(whole, workdir, tasks_dir, tmp_path):
    *_, output = whole
    lines = (output / "lm_eval.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "lm_eval.jsonl").write_text("".join(lines[: len(lines) // 2]))
    result, _ = evaluate(workdir, tmp_path, tasks_dir, "--lm_eval_limit=5", "--lm_eval_learn=both")
    assert result == whole[0]
    assert (tmp_path / "lm_eval.jsonl").read_text().splitlines()[1] == lines[1].strip()


def test_requests_shorter_than_a_mini_batch_are_said_in_result_and_report(workdir, tasks_dir, tmp_path, run):
    choice = (tasks_dir / "mc.yaml").read_text().replace("local_choice", "short").replace("Q: {{question}} A:", "Q")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "short.jsonl").write_text('{"choices": ["ab", "cd"], "answer": 1}\n' * 3)
    (tmp_path / "tasks" / "short.yaml").write_text(
        choice.replace(str(DATA / "lm_eval" / "mc.jsonl"), str(tmp_path / "short.jsonl"))
    )
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    (copy / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    result, records = evaluate(copy, copy / "evaluation", tmp_path / "tasks", "--lm_eval_learn=both", tasks="short")
    [task] = result["tasks"]
    assert (task["num_requests"], task["num_requests_learned_in"]) == (6, 0)
    assert all(record["inner_steps"] == 0 for [record] in records.values())
    assert len("Q cd") < b
    code, out, _ = run("report", f"--workdirs={copy}", f"--output={tmp_path / 'report'}")
    assert code == 0 and "never (6 requests)" in out and LMEval.note.split()[-1] in out
    assert "value without learning" in out
    [row] = json.loads((tmp_path / "report" / "report.json").read_text())
    assert row["lm_eval"] == {"tasks": result["tasks"]}


def test_ruler_runs_without_a_download_or_transformers(harness, workdir, tmp_path, monkeypatch):
    """Its single needle in a repeated haystack; prompts are measured by our own tokenizer."""
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("wonderwords")
    monkeypatch.setattr(nltk, "download", lambda *_: False)
    ruler = Path(harness.__file__).parent / "tasks" / "ruler"  # alone, as it takes 15 seconds to index all tasks
    flags = ['--lm_eval_metadata={"max_seq_lengths":[900]}', "--lm_eval_limit=1"]
    result, records = evaluate(workdir, tmp_path, ruler, *flags, tasks="niah_single_1")
    [record] = records["niah_single_1", 0, 0, True]
    assert 0 <= metrics_of(result)["niah_single_1", "900"] <= 1
    assert record["inner_steps"] > 600 // b
    assert "transformers" not in sys.modules or hasattr(sys.modules["transformers"], "PreTrainedModel")


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_a_missing_extra_is_one_line(check_refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    check_refused("--lm_eval=arc_easy", r"needs lm_eval, which is not installed: pip install 'ttt-e2e\[lm_eval\]'$")


BAD_FLAGS = {
    "--lm_eval=,": "lm_eval is ',', but it takes the names of tasks",
    "--lm_eval=arc_easy --lm_eval_learn=some": "lm_eval_learn is 'some', but it must be one of all, none, both",
    "--lm_eval=arc_easy --lm_eval_limit=-1": "lm_eval_limit is -1, but it must be at least 0",
    "--lm_eval=arc_easy --lm_eval_metadata=[1]": r"lm_eval_metadata is '\[1\]', but it must be a JSON object",
    "--lm_eval_limit=3": "--lm_eval_limit belongs to --lm_eval, which is missing",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_one_line(flags, check_refused):
    check_refused(flags, BAD_FLAGS[flags])


def test_bad_tasks_are_one_line(harness, tasks_dir, check_refused, tmp_path_factory, monkeypatch):
    def of_ours(**options):
        return managers(**(options | {"include_defaults": False}))

    managers = harness.tasks.TaskManager
    monkeypatch.setattr(harness.tasks, "TaskManager", of_ours)  # to index the harness's own takes 15 seconds
    of_dir = f"--lm_eval_tasks_dir={tasks_dir}"
    check_refused(f"--lm_eval=local_choise {of_dir}", "'local_choise', which is no task: did you mean 'local_choice'")
    check_refused("--lm_eval=local_choice --lm_eval_tasks_dir=DIR/none", "DIR/none, but it must be a directory")
    broken = tmp_path_factory.mktemp("broken")
    text = (tasks_dir / "mc.yaml").read_text()
    (broken / "mc.yaml").write_text(text.replace("mc.jsonl", "gone.jsonl"))
    check_refused(f"--lm_eval=local_choice --lm_eval_tasks_dir={broken}", "cannot be loaded .*gone.jsonl")


def test_what_a_task_cannot_be_given_is_one_line(tasks_dir, check_refused, tmp_path_factory):
    flags = f"--lm_eval=local_generation --lm_eval_tasks_dir={tasks_dir} --lm_eval_max_length=24"
    check_refused(flags, "lm_eval_max_length is 24, but local_generation generates 24 tokens")
    beams = tmp_path_factory.mktemp("beams")
    text = (tasks_dir / "gen.yaml").read_text()
    (beams / "gen.yaml").write_text(text.replace("do_sample: false", "num_beams: 4"))
    flags = f"--lm_eval=local_generation --lm_eval_tasks_dir={beams}"
    check_refused(flags, "task local_generation generates by 'num_beams', but there are until, do_sample")


def test_a_result_without_learning_has_no_value_with_it():
    results = {"a": {"acc,none": 0.5, "acc_stderr,none": "N/A", "alias": "a", "sample_len": 3}}
    [task] = summarise({False: {"results": results}}, [])
    [metric] = task["metrics"]
    assert metric["value_without_learning"] == 0.5 and metric["standard_error_without_learning"] is None
    table = LMEval().table({"run": {"tasks": [task]}})
    assert table.header[-2:] == ["value without learning", "std. error"] and table.lines[0][-2:] == ["0.5000", "–"]
