"""The command line: what it accepts, and one sentence for every mistake."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from seer_scale.config import RunConfig
from seer_scale.config.recipe import dump, parse
from seer_scale.config.schema import key_schemas
from seer_scale.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))

# As a launcher does it: the sentence on stderr, the mistake's own exit status.
DRIVER = """
import sys
from pathlib import Path
from seer_scale.errors import UserError
from seer_scale.config.recipe import parse
try:
    parse(sys.argv[2:], recipes=Path(sys.argv[1]), ranks=1)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_status)
finally:
    assert "torch" not in sys.modules
"""


def read(*argv: str) -> RunConfig:
    return parse(argv, recipes=RECIPES, ranks=1).config


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DRIVER, str(RECIPES), *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# Whatever follows `--recipe debug` -> what the sentence must hold.
BAD = [
    # unknown names
    ("train.stepz=5", ["train.stepz is not a key", "did you mean train.steps?"]),
    ("steps=5", ["steps is not a key", "did you mean train.steps or profile.steps?"]),
    ("stepz=5", ["stepz is not a key", "did you mean train.steps or profile.steps?"]),
    ("model.momentum=0.9", ["model.momentum is not a key", "did you mean optim.momentum?"]),
    ("optin.momentum=0.9", ["optin.momentum is not a key", "did you mean optim.momentum?"]),
    ("head_dim=[8]", ["head_dim is not a key", "did you mean model.head_dims?"]),
    ("trian=5", ["trian is not a key", "did you mean train?"]),
    ("data.zzz=1", ["data.zzz is not a key", "data has data.path, data.crop_sizes"]),
    ("qqq=1", ["qqq is not a key", "the sections are run, train, model"]),
    ("train=5", ["train is not a key", "train has train.images", "train.steps"]),
    ("objective.a.b=1", ["objective.a.b is not a key", "objective.name"]),
    ("recipe=demo", ["recipe is an option, not a key", "--recipe demo"]),
    ("--recpie=demo", ["--recpie is not an option", "did you mean --recipe"]),
    ("--train.steps=5", ["--train.steps is not an option", "train.steps=VALUE without dashes"]),
    ("--zzz", ["--zzz is not an option", "--help"]),
    # malformed overrides
    ("train.steps", ["'train.steps' is not an override section.key=value", "train.steps"]),
    ("demo", ["'demo' is not an override section.key=value"]),
    ("train.steps=", ["train.steps= has no value", "an integer > 0"]),
    ("data.crop_sizes=[64,", ["data.crop_sizes=[64, is not valid YAML"]),
    ("data.crop_sizes=*a", ["data.crop_sizes=*a is not valid YAML"]),
    ("data.path='a'b'", ["data.path='a'b' is not valid YAML"]),
    ("train.steps=5 train.steps=6", ["train.steps is given twice: 5 and 6"]),
    ("--resume", ["--resume", "expected one argument"]),
    ("--resume=", ["--resume has no value"]),
    ("--resume=a --resume=b", ["--resume is given twice: a and b"]),
    ("--recipe=demo", ["--recipe is given twice: debug and demo"]),
    # wrong types
    ("train.steps=ten", ['train.steps is "ten"', "an integer > 0", "optimizer steps"]),
    ("train.steps=1.5", ["train.steps is 1.5", "an integer > 0"]),
    ("train.steps=true", ["train.steps is true", "an integer > 0"]),
    ("train.steps=null", ["train.steps is null", "an integer > 0"]),
    ("train.steps=010", ['train.steps is "010"', "an integer > 0"]),
    ("optim.base_lr=high", ['optim.base_lr is "high"', "a number > 0"]),
    ("optim.base_lr=true", ["optim.base_lr is true", "a number > 0"]),
    ("optim.larc=yes", ['optim.larc is "yes"', "true or false"]),
    ("optim.larc=1", ["optim.larc is 1", "true or false"]),
    ("run.dir=''", ['run.dir is ""', "a non-empty string"]),
    ("model.head_dims=256", ["model.head_dims is 256", "a list of integers > 0"]),
    ("model.head_dims=[256,big]", ['model.head_dims is [256, "big"]', "a list of integers > 0"]),
    ("tracking.uri=''", ['tracking.uri is ""', "a non-empty string or null"]),
    # out of range
    ("run.seed=-1", ["run.seed is -1", "an integer >= 0 and <= 4294967295"]),
    ("run.seed=4294967296", ["run.seed is 4294967296", "an integer >= 0 and <= 4294967295"]),
    ("train.steps=0", ["train.steps is 0", "an integer > 0"]),
    ("train.micro_batch_size=-4", ["train.micro_batch_size is -4", "an integer > 0"]),
    ("train.precision=fp16", ['train.precision is "fp16"', "fp32, bf16, amp-o1 or apex-o1"]),
    ("optim.schedule=linear", ['optim.schedule is "linear"', "cosine or constant"]),
    ("optim.momentum=1", ["optim.momentum is 1", ">= 0 and < 1"]),
    ("optim.end_lr_ratio=2", ["optim.end_lr_ratio is 2", ">= 0 and <= 1"]),
    ("optim.weight_decay=-1e-5", ["optim.weight_decay is -1e-05", "a number >= 0"]),
    ("optim.base_lr=.inf", ["optim.base_lr is Infinity", "a finite number > 0"]),
    ("optim.lr=.nan", ["optim.lr is NaN", "a finite number > 0 or null"]),
    ("model.head_dims=[]", ["model.head_dims is []", "a list of integers > 0"]),
    ("model.prototypes=1", ["model.prototypes is 1", "an integer >= 2"]),
    ("model.align_channels=0", ["model.align_channels is 0", "an integer > 0"]),
    ("model.align_channels=-8", ["model.align_channels is -8", "an integer > 0"]),
    ("data.crop_sizes=[64,16]", ["data.crop_sizes is [64, 16]", "integers >= 32"]),
    ("data.blur_probability=1.5", ["data.blur_probability is 1.5", "<= 1"]),
    ("data.crop_scales=[[0.1,0.5,1]]", ["data.crop_scales is [[0.1, 0.5, 1]]", "a list of pairs"]),
    ("sharding.sync_bn_group_size=-2", ["sharding.sync_bn_group_size is -2", ">= -1"]),
    ("sharding.strategy=fsdp2", ['is "fsdp2"', "ddp, fsdp, hsdp, zero or fairscale"]),
    (
        "sharding.activation_checkpointing=some",
        ['is "some"', "none, full, groups or auto:GIB (e.g. auto:12.5)"],
    ),
    # impossible together
    (
        "data.crop_counts=[2,2,2]",
        ["one entry per resolution", "2 ([64, 32])", "3 ([2, 2, 2])"],
    ),
    (
        "data.crop_scales=[[0.14,1]]",
        ["one entry per resolution", "1 ([[0.14, 1.0]])", "[64, 32]", "data.crop_scales=null"],
    ),
    ("data.crop_scales=[[0.5,0.2],[0.1,0.2]]", ["[0.5, 0.2]", "smallest < largest <= 1"]),
    ("data.crop_scales=[[0.5,1.2],[0.1,0.2]]", ["[0.5, 1.2]", "smallest < largest <= 1"]),
    (
        "data.crop_sizes=[64] data.crop_counts=[1]",
        ["data.crop_counts is [1]", "at least 2 crops"],
    ),
    (
        "model.head_dims=[64] model.head_batch_norm=true",
        ["model.head_batch_norm is true", "[64]", "no hidden layer"],
    ),
    ("sharding.strategy=zero", ["sharding.strategy is zero", "--deepspeed_config FILE"]),
    (
        "--deepspeed_config=z.json sharding.strategy=ddp",
        ["sharding.strategy is ddp", "'z.json'", "only strategy zero"],
    ),
    (
        "--deepspeed_config=z.json sharding.deepspeed_config=y.json",
        ["sharding.deepspeed_config is given twice", "y.json", "z.json"],
    ),
    (
        "sharding.activation_checkpointing=groups",
        ["sharding.activation_checkpointing is groups", "sharding.checkpoint_groups is not given"],
    ),
    (
        "sharding.checkpoint_groups=[[2],[]]",
        ["sharding.checkpoint_groups is [[2], []]", "sharding.activation_checkpointing is none"],
    ),
    (
        "sharding.activation_checkpointing=groups sharding.checkpoint_groups=[[2],[9,4]]",
        ["[9, 4]", "do not ascend"],
    ),
]


@pytest.mark.parametrize(("arguments", "fragments"), BAD, ids=[case[0] for case in BAD])
def test_mistake_gets_its_sentence(arguments: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        read("--recipe", "debug", *arguments.split())
    sentence = str(raised.value)
    assert "\n" not in sentence
    for fragment in fragments:
        assert fragment in sentence


@pytest.mark.parametrize(
    "arguments",
    [
        ["--recipe", "dmeo"],
        ["--recipe", "debug", "train.stepz=5"],
        ["--recipe", "debug", "train.steps=[1"],
        ["--recipe", "debug", "data.crop_counts=[1]"],
        ["--bogus"],
        [],
    ],
)
def test_mistake_exits_with_2_and_no_traceback(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


# The text of a recipe file -> what the sentence must hold beside the file's name.
VALID = """
train: {steps: 10, micro_batch_size: 4}
model: {trunk: regnety_debug, head_dims: [32, 16], prototypes: 16}
data: {path: images, crop_sizes: [64, 32], crop_counts: [2, 4]}
"""
BAD_FILES = [
    ("", ["holds null", "sections of keys"]),
    ("- train", ["holds", "sections of keys"]),
    ("train: 5", ["train is 5", "a section of keys"]),
    ("trian:\n  steps: 5\n", ["trian is not a key", "did you mean train?"]),
    ("train:\n  stepz: 5\n", ["train.stepz is not a key", "did you mean train.steps?"]),
    ("train:\n  steps: 5\n  steps: 6\n", ["steps is given twice", "line 3, column 3"]),
    ("train: {}\ndata: {}\ntrain: {}\n", ["train is given twice", "first on line 1", "line 3"]),
    ("objective: {true: 5}", ["objective.True is not a key"]),
    ("train:\n  steps: [5\n", ["not valid YAML", "line 3"]),
    ("train:\n\tsteps: 5\n", ["not valid YAML", "line 2"]),
    ("? [a]\n: 5\n", ["not valid YAML", "unhashable key"]),
    ("train: !!python/object:os.system {}\n", ["not valid YAML", "line 1"]),
    ("a: 1\n---\nb: 2\n", ["not valid YAML", "line 2"]),
    ("train: {micro_batch_size: 4}\n", ["lacks model.trunk", "a non-empty string"]),
    (VALID.replace("steps: 10, ", ""), ["lacks train.images or train.steps", "an integer > 0"]),
    (
        VALID.replace(", micro_batch_size: 4", ""),
        ["lacks train.global_batch or train.micro_batch_size", "an integer > 0"],
    ),
    (
        f"optim: {{warmup_steps: 5, warmup_share: 0.1}}\n{VALID}",
        ["optim.warmup_steps is 5 and optim.warmup_share is 0.1", "leave out one of them"],
    ),
    (VALID.replace("10", "ten"), ['train.steps is "ten"', "an integer > 0"]),
    (f"run: {{dir: 5}}\n{VALID}", ["run.dir is 5", 'quotes make it one: "5"']),
    (f"recipe: 5\n{VALID}", ["recipe is 5", "a non-empty string"]),
]


@pytest.mark.parametrize(("text", "fragments"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, fragments: list[str]) -> None:
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(ConfigError) as raised:
        read("--recipe", path)
    for fragment in [path, *fragments]:
        assert fragment in str(raised.value)


@pytest.mark.parametrize(
    ("recipe", "fragments"),
    [
        ("dmeo", ["there is no recipe 'dmeo'", "did you mean demo", "seer_256gf"]),
        ("dmeo.yaml", ["there is no recipe file 'dmeo.yaml'", "did you mean demo"]),
        ("launch/recipes/seer_256", ["did you mean seer_256gf"]),
        ("zzzzzz", ["there is no recipe 'zzzzzz'", "debug, demo"]),
    ],
)
def test_unknown_recipe(recipe: str, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        read("--recipe", recipe)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_no_recipe_named() -> None:
    with pytest.raises(ConfigError, match=r"add --recipe NAME, one of debug, demo"):
        read("train.steps=5")


def test_unreadable_recipe_files(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "latin.yaml").write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*folder\.yaml: Is a directory"):
        read("--recipe", str(tmp_path / "folder.yaml"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8"):
        read("--recipe", str(tmp_path / "latin.yaml"))


def test_overrides_win_in_any_position() -> None:
    arguments = ["train.steps=20", "--local_rank=1", "--recipe", "debug", "data.crop_counts=[2, 1]"]
    parsed = parse([*arguments, "--resume", "auto", "run.seed=7"], recipes=RECIPES, ranks=1)
    assert parsed.resume == "auto"
    config = parsed.config
    assert (config.train.steps, config.run.seed, config.data.crop_counts) == (20, 7, (2, 1))
    assert (
        parse(["--recipe", "debug", "--local_rank", "0"], recipes=RECIPES, ranks=1).resume is None
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("2E3", 2e3), ("1_000", 1000.0), (".5", 0.5), ("1.", 1.0), ("+3.0e+1", 30.0)],
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert read("--recipe", "debug", f"optim.base_lr={text}").optim.base_lr == value


@pytest.mark.parametrize(
    "text", ["yes", "off", "12:30", "2026-01-01", "a b", "sqlite:///x.db", "é"]
)
def test_words_stay_words(text: str) -> None:
    assert read("--recipe", "debug", f"tracking.uri={text}").tracking.uri == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("123", "123"),
        ("true", "true"),
        ("*.tar", "*.tar"),
        ("{a..b}.tar", "{a..b}.tar"),
        ("[a]", "[a]"),
        ("a: b #c", "a: b #c"),
        ("'it''s'", "it's"),
        ('"5"', "5"),
        ("'null'", "null"),
    ],
)
@pytest.mark.parametrize(
    "key", ["data.path", "run.dir", "tracking.experiment", "tracking.uri", "model.trunk"]
)
def test_strings_are_taken_as_written(key: str, text: str, value: str) -> None:
    section, name = key.split(".")
    config = read("--recipe", "debug", f"{key}={text}")
    assert getattr(getattr(config, section), name) == value


def test_null_is_null_where_it_is_allowed() -> None:
    nulls = ("tracking.uri=null", "tracking.registered_name=null", "run.dir=null")
    config = read("--recipe", "debug", *nulls, "data.path=null")
    assert config.tracking.uri is None
    assert (config.tracking.registered_name, config.run.dir) == ("seer-debug", "runs/debug")
    assert config.data.path == "null"


@pytest.mark.parametrize(
    ("sizes", "counts", "scales"),
    [
        ("[64]", "[2]", ((0.14, 1.0),)),
        ("[96,64,32]", "[2,1,3]", ((0.14, 1.0), (0.05, 0.14), (0.05, 0.14))),
    ],
)
def test_scales_follow_the_resolutions(
    sizes: str, counts: str, scales: tuple[tuple[float, float], ...]
) -> None:
    crops = (f"data.crop_sizes={sizes}", f"data.crop_counts={counts}")
    assert read("--recipe", "debug", *crops).data.scales == scales


def test_scales_of_a_recipe_are_not_dropped_in_silence(tmp_path: Path) -> None:
    scales = "crop_scales: [[0.3, 1.0], [0.1, 0.3]]"
    path = write(tmp_path / "mine.yaml", VALID.replace("path: images", f"path: images, {scales}"))
    assert read("--recipe", path).data.scales == ((0.3, 1.0), (0.1, 0.3))
    with pytest.raises(ConfigError, match=r"data\.crop_scales needs one entry per resolution"):
        read("--recipe", path, "data.crop_sizes=[64]", "data.crop_counts=[2]")


def test_a_run_may_end_inside_its_warm_up() -> None:
    config = read("--recipe", "debug", "train.steps=2")
    assert config.optim.warmup_steps == config.train.steps == 2
    assert read("--recipe", "debug", "run.seed=4294967295").run.seed == 2**32 - 1


def test_same_override_twice_is_no_contradiction() -> None:
    assert read("--recipe", "debug", "train.steps=9", "train.steps=9").train.steps == 9


def test_defaults_that_follow_from_the_recipe(tmp_path: Path) -> None:
    config = read("--recipe", write(tmp_path / "mine.yaml", VALID))
    assert config.recipe == "mine"
    assert config.run.dir == "runs/mine"
    assert config.tracking.registered_name == "seer-mine"
    config = read("--recipe", "debug", "run.dir=/x", "tracking.registered_name=mine")
    assert (config.run.dir, config.tracking.registered_name) == ("/x", "mine")


def test_deepspeed_config_implies_its_strategy() -> None:
    sharding = read("--recipe", "debug", "--deepspeed_config", "z.json").sharding
    assert (sharding.strategy, sharding.deepspeed_config) == ("zero", "z.json")
    assert read("--recipe", "debug").sharding.strategy == "ddp"


def test_another_objective_drops_the_options_of_the_recipes() -> None:
    objective = read(
        "--recipe", "debug", "objective.temperature=0.5", "objective.name=simclr"
    ).objective
    assert (objective.name, objective.options) == ("simclr", {"temperature": 0.5})
    objective = read("--recipe", "debug", "objective.name=swav", "objective.epsilon=0.1").objective
    assert objective.options["sinkhorn_iterations"] == 3
    assert objective.options["epsilon"] == 0.1


def test_a_recipe_that_names_no_objective_has_options_of_swav(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", f"objective: {{epsilon: 0.03}}\n{VALID}")
    for argv in ([], ["objective.name=swav"]):
        objective = read("--recipe", path, *argv).objective
        assert (objective.name, objective.options) == ("swav", {"epsilon": 0.03})
    objective = read("--recipe", path, "objective.name=simclr").objective
    assert (objective.name, objective.options) == ("simclr", {})
    assert read("--recipe", write(tmp_path / "no.yaml", VALID)).objective.name == "swav"


@pytest.mark.parametrize("name", NAMES)
def test_dump_reads_back_equal(tmp_path: Path, name: str) -> None:
    config = read("--recipe", name, "--deepspeed_config", "ds_configs/zero2.json")
    path = write(tmp_path / "config.yaml", dump(config))
    assert read("--recipe", path) == config


@pytest.mark.parametrize("text", ["1e-5", "yes", "null", "5", "", "a: b", "é", "#x", "12:30", "~"])
def test_dump_keeps_strings_strings(tmp_path: Path, text: str) -> None:
    config = read("--recipe", "debug", "optim.lr=1e-7", f"tracking.uri='x{text}'")
    values = config.model_dump()
    values["objective"]["note"] = text
    config = RunConfig.model_validate(values)
    path = write(tmp_path / "config.yaml", dump(config))
    assert read("--recipe", path) == config


def test_help_names_every_key_and_recipe_without_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor seconds: what the clock says depends on who else is at work on the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == 0, done.stderr
    for name in (*key_schemas(), *NAMES, "--deepspeed_config", "--resume", "objective.*"):
        assert name in done.stdout
    for text in ("default: runs/<recipe>", "an integer > 0; default: from the recipe", "1e-05"):
        assert text in done.stdout


def test_config_is_frozen() -> None:
    config = read("--recipe", "debug")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5  # type: ignore[misc]  # what is refused


def test_the_key_that_is_gone_is_accepted_where_it_had_no_effect(tmp_path: Path) -> None:
    before = dump(read("--recipe", "debug")).replace("optim:\n", "optim:\n  nesterov: false\n")
    path = write(tmp_path / "config.yaml", before)
    assert "nesterov: false" in before
    assert read("--recipe", path) == read("--recipe", "debug", "optim.nesterov=false")
    assert "nesterov" not in dump(read("--recipe", path))
    write(Path(path), before.replace("nesterov: false", "nesterov: true"))
    for argv in (["--recipe", path], ["--recipe", "debug", "optim.nesterov=true"]):
        with pytest.raises(ConfigError, match=r"optim.nesterov is true, but the key is gone"):
            read(*argv)
