"""What `--help` says of each verb: usage, what it does, an example line."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from core.slots.slot import Slot


class Verb(NamedTuple):
    """What the help says of a verb."""

    usage: str
    takes: str
    """What it needs before its flags, for errors."""
    about: str
    example: str


OVERRIDES = (
    "Any field is a flag: --optim.lr 6e-5, or short --lr 6e-5. So is the class of a slot: --optim.ema=EMA,\n"
    "--system.autoencoder=None."
)
A_RUN = "a run: its MLflow id or its output directory"

VERBS = {
    "list": Verb(
        "[WORD …] [--tag KEY[=VALUE] …] [--where CONDITION …] [--json]",
        "nothing",
        "List all recipes, or those for which all holds that is given. Exit code 1 when there is none.\n"
        "A word stands in the name or in the docstring. --tag is a tag of tracking.tags, or experiment=NAME. --where\n"
        "is a field, one of < <= > >= = != and a value, in quotes; a recipe without the field is left out.",
        "python -m registry list sky --tag experiment=lvdm --where 'optim.lr<1e-4'",
    ),
    "show": Verb(
        "NAME [overrides] [--json | --origin [--json]]",
        "the name of a recipe",
        "Show a recipe with every field; --json: as the recipe.json of a run.\n"
        "--origin: where each field is set, as class and file:line.\n"
        f"{OVERRIDES}\n`show NAME --help` lists the flags of that recipe.",
        "python -m registry show lvdm-short-sky --lr 6e-5",
    ),
    "diff": Verb(
        "A B [--json | --as flags | --as recipe [--name NAME]] [--store URI]",
        "two sides, each a recipe, a recipe in quotes with overrides, NAME@REVISION, a recipe.json, an output "
        "directory or run:<id>",
        "Show the fields that differ between two recipes. Exit code 0 when none does, 1 when some do.\n"
        "A side is a name, a name with overrides in quotes, a recipe.json, the output directory of a run,\n"
        "run:<MLflow run id>, or NAME@REVISION: the recipe as it stood at a commit of this project's git, which\n"
        "another process reads. --as flags prints the shortest flags that turn A into B; --as recipe the child of\n"
        "the recipe that A is called after, with the fields of B. On a terminal red is what only A has, green what\n"
        "only B has.",
        'python -m registry diff lvdm-short-sky "lvdm-short-sky --lr 6e-5"',
    ),
    "run": Verb(
        "NAME [overrides] [launch flags]",
        "the name of a recipe",
        f"Train a recipe.\n{OVERRIDES}\n"
        "`run NAME --help` lists the flags of that recipe; --dry-run prints what a run would be.",
        "python -m registry run lvdm-short-sky-tiny --max-steps 200 --output-dir runs/first",
    ),
    "launch": Verb(
        "NAME [overrides] [launch flags] --slurm | --k8s [cluster flags]",
        "the name of a recipe",
        "Print the job that trains a recipe on several machines: an sbatch script, or a PyTorchJob for Kubernetes.\n"
        "Recipe and flags are checked first. The job goes on in its output directory when it is started again; the\n"
        "SLURM job stops before its time limit, with a checkpoint, and queues itself again. --submit hands it in.",
        "python -m registry launch lvdm-short-sky-tiny --output-dir runs/sky --slurm --nodes 2 --gpus 4",
    ),
    "resume": Verb(
        "RUN_OR_DIR [overrides] [launch flags]",
        A_RUN,
        "Go on with a run that was stopped, from its newest whole checkpoint and with its own recipe.\n"
        "An override that changes what is learnt needs --allow FIELD.",
        "python -m registry resume runs/first --max-steps 400",
    ),
    "sample": Verb(
        "WHAT [--prompt TEXT …] [--num N] [--seed S] [--steps K] [--sampler=CLASS] [flags]",
        "what to sample from: a run, a checkpoint folder, an exported folder, or a recipe with --weights",
        "Make clips from a run, a checkpoint folder, an exported folder, or a recipe with --weights.\n"
        "WHAT is an MLflow run id or a directory, or the name of a recipe. Clips are of the texts of --prompt, of\n"
        "those in the file --prompts (one a line), or of what is typed (--interactive). The averaged weights are\n"
        "used where there are some, unless --raw is given. The same seed gives the same clip of a prompt, whatever\n"
        "else is made. Each clip is an mp4, a gif and a strip of frames; samples.json says what made it. The same\n"
        "command with the same --output-dir goes on after a kill. Prints the folder.",
        "python -m registry sample runs/first --num 8 --seed 1 --sampler=DPMSolverMultistep --steps 20",
    ),
    "eval": Verb(
        "WHAT [--captions FILE] [--guidance-scale S …] [--inception FILE | --i3d FILE] [--clip DIR] [flags]",
        "what to evaluate: a run, a checkpoint folder, an exported folder, or a recipe with --weights",
        "Generate for captions at several guidance scales and score: distance to held-out data, CLIP score, the\n"
        "recipe's own metric, beside a second real sample and what needs no model. Table and plot go to the run.\n"
        "A caption has the same noise at every scale. An evaluation that was stopped goes on where it was. Without\n"
        "--inception or --i3d distances are over hand-made features, to be compared within this project only.",
        "python -m registry eval runs/first --captions captions.txt --guidance-scale 1 3 5 7",
    ),
    "measure-latents": Verb(
        "NAME [overrides] [--clips N] [--weights W] [--write]",
        "the name of a recipe",
        "Measure the scale and shift of an autoencoder's latents. With them they have mean 0 and deviation 1 on the\n"
        "recipe's data.",
        "python -m registry measure-latents lvdm-short-sky-tiny",
    ),
    "weights": Verb(
        "info PATH [--json] | import PATH --to DIR [--as unet|vae] [--for RECIPE] [--ema] [--partial] [--alpha A]\n"
        "       | export RUN --to DIR [--raw] [--layout LAYOUT] | merge ADAPTER LORA --to DIR [--replace-if-exists]\n"
        "       | push RUN_OR_FOLDER --repo NAMESPACE/NAME [--private] [--every]",
        "info, import, merge, export or push, and a path or a run",
        "What a checkpoint of others holds (info), the same as diffusers folders that recipes open (import), and the\n"
        "networks of a run as diffusers folders (export), also to the Hugging Face hub (push; the token is HF_TOKEN).\n"
        "merge folds a LoRA into motion modules; --layout writes motion modules or a LoRA, of a run or a PATH, as\n"
        "other programs open them.\n"
        "PATH is a file (.safetensors, .ckpt, .pt, .bin, .pdparams), a folder, a hub id or run:<id>. Nothing in it is\n"
        "executed.",
        "python -m registry weights info shipped:lvdm-video-vae-tiny",
    ),
    "data": Verb(
        "make laion --out DIR [--records N] [--parts N] [--pictures FOLDER]\n"
        "       | list laion FOLDER [--to DIR] | convert LIST --to DIR [--records N]\n"
        "       | check NAME [overrides] [--samples N] | plan NAME [overrides]\n"
        "       | cache NAME [overrides] [--to DIR] [--draws N] [--nproc N]",
        "make, list, convert, check, plan or cache, and what",
        "Make, list and convert parts of captioned pictures (Base64Parts); read a recipe's data and count (check).\n"
        "make laion writes part-00000.gz, …, of synthetic pictures or of those in a folder; list laion writes lists\n"
        "of the parts below a folder; convert turns the parts of a list, a folder or a glob into tar shards\n"
        "(webdataset). check says what is left out and why, and what of N samples cannot be read; exit code 1 where\n"
        "a run would stop. plan prints the buckets of a recipe's data (BucketedVideos), and what was dropped and why.\n"
        "cache computes the latents of a recipe's clips and the states of its captions once, for\n"
        "`run NAME --cache DIR`; the same command goes on after a kill.\n"
        "`data make --help`, …, `data cache --help` list the flags. For example:\n"
        "  python -m registry data cache lvdm-text2video-tiny --to caches/clouds --nproc 2\n"
        "  python -m registry run lvdm-text2video-tiny --cache caches/clouds",
        "python -m registry data make laion --out datasets/laion-try --records 200",
    ),
    "sync": Verb(
        "[RUN_OR_DIR] [--store URI]",
        "nothing",
        "Send to MLflow what it lacks of a run.\n"
        "A server that was down or slow has gaps; the run's journal has none. Without a run: all under ./runs.\n"
        "Doing it twice changes nothing; another --store gets a copy. Exit code 1 when something is left.",
        "python -m registry sync runs/first",
    ),
    "runs": Verb(
        "[--recipe NAME] [--limit N] [--json] [--store URI]",
        "nothing",
        "List the runs of the MLflow store, the newest first; the last column is recipe.delta.\n"
        "It is the shortest flags from the registered recipe to what the run trained, a tag of the run in MLflow too.",
        "python -m registry runs --recipe lvdm-short-sky-tiny",
    ),
    "promote": Verb(
        "RUN --as NAME [--store URI]",
        A_RUN,
        "Make a recipe of what a run trained: a child of its recipe, in a file of its own in recipes/.\n"
        "The class says only what is different, formatted, and is imported at once.",
        "python -m registry promote runs/first --as lvdm-short-sky-longer",
    ),
    "doctor": Verb(
        "[--fix] [--store URI]",
        "nothing",
        "Say what this machine has, and find runs that say RUNNING and are dead.\n"
        "--fix closes those as KILLED and sends what MLflow lacks of their journals.\n"
        "Exit code 1 when something is left to do.",
        "python -m registry doctor --fix",
    ),
    "ui": Verb(
        "[--host H] [--port P] [--store URI]",
        "nothing",
        "Open MLflow's web page over the store of the runs.",
        "python -m registry ui",
    ),
    "translate": Verb(
        "SCRIPT | 'COMMAND' | COMMAND …",
        "a script, or a command in quotes",
        "Say a command line of the original systems in ours, flag by flag.\n"
        "The systems are LVDM and LDM of PaddleMIX, and AnimateDiff of ms-swift: training, samples, evaluation,\n"
        "conversion, viewer and launchers. What is printed is a shell script: our commands, and before each in\n"
        "comments what is mapped, implied, no longer needed and why, added (what a program does without a flag) and\n"
        "unknown.\n"
        "Nothing of what is given is executed. Exit code 1 when something is unknown, or a command would be refused.",
        "python -m registry translate 'python -u train_lvdm_short.py --learning_rate 6e-5 --output_dir out'",
    ),
}


def overview() -> str:
    """The help of the whole command."""
    width = max(map(len, VERBS))
    first = {name: " ".join(verb.about.split()).partition(". ")[0].rstrip(".") for name, verb in VERBS.items()}
    verbs = "\n".join(
        fill(about, 110, initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4))
        for name, about in first.items()
    )
    return f"""\
usage: python -m registry VERB …

Video and image diffusion experiments, kept as code.

verbs:
{verbs}

`python -m registry VERB --help` says more; --debug (or REGISTRY_DEBUG=1) shows tracebacks; --version.

example:
  python -m registry run lvdm-short-sky-tiny"""


def print_verb(words: list[str], verb: str, *parts: Slot) -> int:
    """Print the help of one verb, with the flags of `parts`; `words` may be a recipe's name and overrides."""
    entry = VERBS[verb]
    usage = entry.usage.replace("NAME", words[0]) if words else entry.usage
    page = f"usage: python -m registry {verb} {usage}\n\n{entry.about}\n\nexample:\n  {entry.example}"
    if parts:
        from core.cli import print_help

        print_help(words[1:], page, *parts)
    else:
        print(page)
    return 0
