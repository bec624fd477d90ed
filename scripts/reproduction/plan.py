"""The plan of the reproduction: which models are trained from the one teacher, and which rows measure them.

Main rows compare the methods. Ablations are self-forcing DMD from other starts and with other settings.

All rows of one form have equal budgets. A student starts from the teacher's weights with `start_steps` updates by
teacher forcing or diffusion forcing. From it every method trains for `steps` updates with the same number of clips.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FORMS = {"framewise": 1, "chunkwise": 3}  # latent frames of a chunk
MANY_STEPS = ("sampler=causal_many_step",)


@dataclass(frozen=True)
class Budget:
    """How much is trained and measured."""

    name: str
    forms: tuple[str, ...]
    seeds: tuple[int, ...]
    """Seeds of the trainings of the main rows. Other rows have the first one."""
    start_steps: int
    """Updates of the students from which the methods start. Batches have 16 clips."""
    steps: int
    """Updates of every method after that. Batches have 8 clips."""
    prompts: int
    """Held-out prompts that are measured."""
    video_seeds: tuple[int, ...]
    """Seeds of the measured videos, for each prompt."""
    pairs: tuple[str, ...] = ()
    """Arguments of make_ode_pairs.py, for the starts that regress to trajectories."""
    main: bool = True
    """Train and measure the main rows. Without them, only self-forcing DMD is there, to compare the ablations with."""
    ablations: bool = False
    """Also train self-forcing DMD from other starts and in variants, with the first seed."""


QUICK = Budget(
    "quick",
    ("framewise",),
    (0,),
    start_steps=100,
    steps=80,
    prompts=24,
    video_seeds=(0,),
    pairs=("--count", "256", "--solver_steps", "24"),
)
FULL = Budget(
    "full",
    ("framewise", "chunkwise"),
    (0, 1, 2),
    start_steps=400,
    steps=220,
    prompts=96,
    video_seeds=(0, 1, 2),
    ablations=True,
)


@dataclass(frozen=True)
class Training:
    """One run of train.py."""

    name: str
    config: str
    """A file of configs/shapes."""
    seed: int
    steps: int
    overrides: tuple[str, ...] = ()
    start: str | None = None
    """The training whose model this one starts from. None is the teacher."""
    pairs: tuple[str, ...] | None = None
    """Arguments of make_ode_pairs.py, which runs before. None: the training needs no pairs."""


@dataclass(frozen=True)
class MethodRow:
    """One row of the table: a method, in one form."""

    method: str
    form: str
    trainings: tuple[str, ...]
    """One training for each seed."""
    overrides: tuple[str, ...] = ()
    """How its videos are made, in addition to the form."""
    lengths: tuple[int, ...] = (1, 2, 4, 10)
    """Multiples of the training length."""
    main: bool = True

    @property
    def name(self) -> str:
        """The row's name, which is also that of its files."""
        return f"{self.form}-{self.method.lower().replace(' + ', '-').replace(' ', '-').replace(',', '')}"


@dataclass(frozen=True)
class ReproductionPlan:
    """Everything that a budget pays for, in the order in which it runs."""

    budget: Budget
    trainings: tuple[Training, ...]
    rows: tuple[MethodRow, ...]


METHODS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # method -> configuration, the student it starts from, and overrides
    "Teacher forcing": ("teacher_forcing", "tf", ("trainer.batch_size=8",)),
    "Diffusion forcing": ("diffusion_forcing", "df", ("trainer.batch_size=8",)),
    "TF + DMD": ("causvid", "tf", ("dmd.clean_context=true",)),
    "DF + DMD": ("causvid", "df", ()),
    "Self Forcing DMD": ("self_forcing_dmd", "df", ()),
    "Self Forcing DMD from teacher forcing": ("self_forcing_dmd", "tf", ()),
    "Self Forcing SiD": ("self_forcing_sid", "df", ()),
    "Self Forcing GAN": ("self_forcing_gan", "df", ()),
}

VARIED = "Self Forcing DMD"  # the method that the ablations vary
ABLATIONS: dict[str, tuple[str, ...]] = {
    "1 step": ("rollout.denoising_steps=[1000]",),
    "2 steps": ("rollout.denoising_steps=[1000,500]",),
    "window 3": ("rollout.window=3",),
    "sink 1": ("rollout.sink=1",),
    "context noise 100": ("rollout.context_noise=100",),
    "guidance 0": ("dmd.real_guidance_scale=0",),
    "guidance 4": ("dmd.real_guidance_scale=4",),
    "1 critic update": ("dmd.critic_updates=1",),
    "5 critic updates": ("dmd.critic_updates=5",),
    "no replay": ("dmd.replay_rollouts=0",),
    "gradient through all steps": ("dmd.gradient_steps=all",),
    "cache not detached": ("dmd.detach_cache=false",),
}
ABLATION_LENGTHS = (1, 2, 4)
AT_INFERENCE_TOO = ("rollout.",)  # an ablation of these keys makes its videos in the same way


def build_plan(budget: Budget) -> ReproductionPlan:
    """Return the trainings and the rows of a budget."""
    trainings: list[Training] = []
    rows: list[MethodRow] = []
    methods = METHODS if budget.main else (VARIED,)
    for form in budget.forms:
        for seed in budget.seeds:
            trainings += _students(budget, form, seed)
            trainings += [_method(budget, form, method, seed) for method in methods]
        for method in methods:
            names = tuple(_method(budget, form, method, seed).name for seed in budget.seeds)
            rows += [replace(row, main=budget.main) for row in _rows(form, method, names)]
        for training, row in [*_ablations(budget, form), *_starts(budget, form)] if budget.ablations else []:
            trainings += training
            rows.append(replace(row, lengths=ABLATION_LENGTHS))
    rows.sort(key=lambda row: row.overrides == MANY_STEPS)  # the slowest ones are measured last
    return ReproductionPlan(budget, tuple(trainings), tuple(rows))


def _students(budget: Budget, form: str, seed: int) -> list[Training]:
    """Return the trainings by teacher forcing and diffusion forcing from which the methods start."""
    return [
        Training(f"{form}-{short}-start-{seed}", config, seed, budget.start_steps, _form(form))
        for short, config in (("df", "diffusion_forcing"), ("tf", "teacher_forcing"))
    ]


def _method(budget: Budget, form: str, method: str, seed: int) -> Training:
    config, short, overrides = METHODS[method]
    name = f"{MethodRow(method, form, ()).name}-{seed}"
    return Training(name, config, seed, budget.steps, (*_form(form), *overrides), f"{form}-{short}-start-{seed}")


def _rows(form: str, method: str, trainings: tuple[str, ...]) -> list[MethodRow]:
    """Return the rows of a method: those that can take many steps have one with many and one with four."""
    if method in ("Teacher forcing", "Diffusion forcing"):
        many = MethodRow(f"{method} many steps", form, trainings, MANY_STEPS, (1, 2, 4))
        return [many, MethodRow(f"{method} 4 steps", form, trainings)]
    return [MethodRow(method, form, trainings)]


def _starts(budget: Budget, form: str) -> list[tuple[list[Training], MethodRow]]:
    """Return self-forcing DMD after ODE regression, causal ODE and causal consistency."""
    seed, made = budget.seeds[0], []
    for label, config, short in (
        ("ODE regression", "ode_regression", None),
        ("causal ODE", "causal_ode", "tf"),
        ("causal consistency", "causal_consistency", "tf"),
    ):
        key = label.lower().replace(" ", "-")
        start = None if short is None else f"{form}-{short}-start-{seed}"
        pairs = None if config == "causal_consistency" else (*budget.pairs, *(("--causal",) if short else ()))
        first = Training(f"{form}-{key}-{seed}", config, seed, budget.start_steps, _form(form), start, pairs)
        method = f"{VARIED} from {label}"
        second = replace(_method(budget, form, VARIED, seed), start=first.name)
        second = replace(second, name=f"{MethodRow(method, form, ()).name}-{seed}")
        made.append(([first, second], MethodRow(method, form, (second.name,), main=False)))
    return made


def _ablations(budget: Budget, form: str) -> list[tuple[list[Training], MethodRow]]:
    """Return the variants of self-forcing DMD."""
    made = []
    for label, overrides in ABLATIONS.items():
        method = f"{VARIED}, {label}"
        training = _method(budget, form, VARIED, budget.seeds[0])
        name = f"{MethodRow(method, form, ()).name}-{budget.seeds[0]}"
        training = replace(training, name=name, overrides=(*training.overrides, *overrides))
        shown = tuple(override for override in overrides if override.startswith(AT_INFERENCE_TOO))
        made.append(([training], MethodRow(method, form, (name,), shown, main=False)))
    return made


def _form(form: str) -> tuple[str, ...]:
    return (f"rollout.frames_per_chunk={FORMS[form]}",)
