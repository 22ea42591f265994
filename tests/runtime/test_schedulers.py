"""Tables probed from schedulers, against diffusers' own loop in float64, with a nonlinear network
between the steps."""

import copy
import inspect

import diffusers
import numpy as np
import pytest
import torch
from covered import covered

from fastdiff.kernels.guided_step import guided_step
from fastdiff.models.blocks import channels_first, channels_last
from fastdiff.runtime import schedulers
from fastdiff.runtime.contents import digest_of
from fastdiff.runtime.schedulers import NotLinear, probe
from fastdiff.runtime.trajectory import PerStep, following

BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SCHEDULERS = [
    ("DDIMScheduler", {}),
    ("DDPMScheduler", {}),
    ("PNDMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("SASolverScheduler", {}),
]
NAMED = [
    pytest.param(name, options, id=name + ",".join(f"-{v}" for v in options.values()))
    for name, options in SCHEDULERS
]
FLOW = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
NAMES = sorted({name for name, _ in SCHEDULERS})
ALWAYS = {"clip_sample": False, "skip_prk_steps": True, "lower_order_final": True}
CASTING = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    *FLOW,
)
"""Schedulers that cast to float32 inside their step: they may differ by 2e-6, others by 1e-10."""
SHAPE = (2, 4, 3, 5)


def network(x, timestep):
    """Any smooth nonlinear function of sample and time."""
    mixed = x.roll(1, dims=-1) * 0.3 + x.roll(1, dims=1) * 0.2
    return torch.tanh(x * 0.7 - mixed) + 0.1 * torch.sin(timestep.double() * 0.01 + mixed)


def make(name, **options):
    cls = getattr(diffusers, name)
    takes = inspect.signature(cls.__init__).parameters
    usual = {k: v for k, v in (BETAS | ALWAYS).items() if k in takes}
    usual = {} if name == "UnCLIPScheduler" else usual  # its schedule cannot be changed
    return cls(**(usual | options))


def predicted(scheduler, x, timestep):
    """The network's output, followed by channels for the variance if the scheduler reads them."""
    output = network(x, timestep)
    learns = scheduler.config.get("variance_type") == "learned_range"
    return torch.cat([output, network(1 - 2 * x, timestep)], 1) if learns else output


def own_loop(scheduler, timesteps, options):
    """The loop of every diffusers pipeline; the result and the final state of the generator."""
    scheduler, generator = copy.deepcopy(scheduler), torch.Generator().manual_seed(2)
    x = first_sample(scheduler)
    takes = inspect.signature(scheduler.step).parameters
    options = options | ({"generator": generator} if "generator" in takes else {})
    for i, t in enumerate(timesteps):
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        output = predicted(scheduler, scale(x, t), t)
        given = {k: v[i] if isinstance(v, PerStep) else v for k, v in options.items()}
        x = scheduler.step(output, t, x, return_dict=False, **given)[0]
    return x, generator.get_state()


def table_loop(table, scheduler):
    """The same loop by `guided_step` on the probed table, channels last."""
    generator = torch.Generator().manual_seed(2)
    x = channels_last(first_sample(scheduler))
    history = torch.full((2, table.depth, *x.shape), float("nan"), dtype=torch.float64)
    rows, following = table.rows(), table.scales[0] * x
    limits = torch.full(SHAPE[:1], float("nan"), dtype=torch.float64) if table.thresholds else None
    for i, t in enumerate(table.timesteps):
        noise = torch.zeros(SHAPE, dtype=torch.float64)
        if table.draws[i]:
            dtype = table.noise_dtype or torch.float64
            noise = torch.randn(SHAPE, generator=generator, dtype=dtype).double()
        output = channels_last(predicted(scheduler, channels_first(following), t))
        drawn = channels_last(noise)
        guided_step(*(output, x, history, following, rows, torch.tensor([i]), drawn), limits=limits)
    return channels_first(x), generator.get_state()


def first_sample(scheduler):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x * getattr(scheduler, "init_noise_sigma", 1.0)


def relative_error(got, want):
    return float((got - want).abs().max() / want.abs().max())


def assert_follows(scheduler, timesteps=None, **options):
    """Check that the table gives what the scheduler gives, and draws the same noise."""
    table = probe(scheduler, options, timesteps)
    got, drawn = table_loop(table, scheduler)
    want, own = own_loop(scheduler, table.timesteps, options)
    allowed = 2e-6 if type(scheduler).__name__ in CASTING else 1e-10
    assert relative_error(got, want) <= allowed
    assert torch.equal(drawn, own)


def assert_follows_or_cannot_run(scheduler, timesteps=None, **options):
    """As `assert_follows`; a table may be refused where diffusers' own loop raises or gives NaN."""
    try:
        assert_follows(scheduler, timesteps, **options)
    except NotLinear:
        try:
            want, _ = own_loop(scheduler, scheduler.timesteps, options)
        except Exception:  # any error of diffusers
            return
        assert not want.isfinite().all(), "it runs, but was refused"


@pytest.mark.parametrize(
    ("name", "options", "prediction"),
    covered(NAMED, ["epsilon", "v_prediction"], together=1),
)
def test_table_follows_the_scheduler(name, options, prediction):
    scheduler = make(name, **options, prediction_type=prediction)
    for steps in (4, 25, 50):
        scheduler.set_timesteps(steps)
        assert_follows(scheduler)


OPTIONS = [
    *({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")),
    {"use_lu_lambdas": True},
    *({"final_sigmas_type": kind} for kind in ("zero", "sigma_min")),
    *({"timestep_spacing": kind} for kind in ("linspace", "leading", "trailing")),
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    {"prediction_type": "sample"},
    {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
    {"set_alpha_to_one": True},
    {"set_alpha_to_one": False},
    {"interpolation_type": "log_linear"},
    {"timestep_type": "continuous", "use_karras_sigmas": True},
    *({"variance_type": kind} for kind in ("fixed_large", "fixed_small_log", "learned_range")),
    *({"solver_order": order} for order in (1, 2, 3)),
    *({"solver_order": order, "solver_type": "bh1"} for order in (1, 2, 3)),
    {"solver_order": 2, "solver_type": "heun"},
    {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    {"algorithm_type": "noise_prediction", "predictor_order": 3, "corrector_order": 3},
    {"algorithm_type": "data_prediction", "predictor_order": 1, "corrector_order": 0},
    {"predict_x0": False},
    {"disable_corrector": [0, 1]},
    {"lower_order_final": False},
    {"euler_at_final": True},
]


COUNTS = (1, 7, 2, 3)
"""Numbers of steps; with few of them, the first steps are also the last ones."""


def made(name, options):
    """A scheduler, or None if it does not know an option or its value."""
    if not set(options) <= set(inspect.signature(getattr(diffusers, name).__init__).parameters):
        return None
    try:
        return make(name, **options)
    except (ValueError, NotImplementedError):
        return None


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("every", [pytest.param(True, id="all", marks=pytest.mark.product), False])
@pytest.mark.parametrize("name", NAMES)
def test_options(name, every):
    """All options that a scheduler knows. `make test` takes 1 step or 7 by turns, so that each
    scheduler and each option has both."""
    for at, options in enumerate(OPTIONS):
        turn = (NAMES.index(name) + at) % 2
        for steps in COUNTS if every else COUNTS[turn : turn + 1]:
            if (scheduler := made(name, options)) is None:
                continue
            try:
                scheduler.set_timesteps(steps)
            except ValueError:
                continue
            assert_follows_or_cannot_run(scheduler)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # shift_terminal, 1 step
@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"shift_terminal": 0.1},
        {"stochastic_sampling": True},
        {"use_karras_sigmas": True},
        {"use_beta_sigmas": True},
    ],
    ids=str,
)
def test_flow_matching(name, options):
    if not set(options) <= set(inspect.signature(getattr(diffusers, name).__init__).parameters):
        return
    scheduler = make(name, **options)
    for steps in (1, 4, 25):
        scheduler.set_timesteps(steps, **({"mu": 0.7} if "use_dynamic_shifting" in options else {}))
        assert_follows_or_cannot_run(scheduler)


def takes_by_hand(what):
    """Schedulers whose `set_timesteps` takes `what`."""
    methods = {name: getattr(diffusers, name).set_timesteps for name in NAMES + FLOW}
    return [name for name in methods if what in inspect.signature(methods[name]).parameters]


@pytest.mark.parametrize("name", takes_by_hand("timesteps"))
def test_timesteps_by_hand(name):
    scheduler = make(name)
    scheduler.set_timesteps(timesteps=[900, 700, 420, 111, 7])
    assert_follows(scheduler)


@pytest.mark.parametrize("name", takes_by_hand("sigmas"))
def test_sigmas_by_hand(name):
    flow = "use_flow_sigmas" in inspect.signature(getattr(diffusers, name).__init__).parameters
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if flow else {}
    scheduler = make(name, **options)
    short = flow or name in FLOW
    by_hand = [1.0, 0.8, 0.5, 0.2] if short else [14.1, 7.0, 3.0, 1.0, 0.3, 0.0]
    scheduler.set_timesteps(sigmas=np.array(by_hand))
    assert_follows(scheduler)


@pytest.mark.parametrize("name", NAMES + FLOW)
def test_a_part_of_the_timesteps(name):
    """Image to image starts in the middle and `denoising_end` stops there, so the loop runs over a
    part of the scheduler's timesteps."""
    scheduler = make(name)
    scheduler.set_timesteps(20)
    whole, first = probe(scheduler), scheduler.timesteps[:13]
    assert len(whole.timesteps) == len(scheduler.timesteps)
    assert len(probe(scheduler, timesteps=first).timesteps) == 13  # not the whole table
    assert_follows(scheduler, first)
    for start in (12, 13):  # one of them is inside a step of an order-2 scheduler
        scheduler.set_timesteps(20)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        assert_follows_or_cannot_run(scheduler, scheduler.timesteps[start:])


@pytest.mark.parametrize("name", NAMES + FLOW)
def test_a_scheduler_that_has_run(name):
    """A run that stopped early leaves a history; each `set_timesteps` clears it."""
    scheduler = make(name)
    scheduler.set_timesteps(16)
    x = first_sample(scheduler)
    for t in scheduler.timesteps[:5]:
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        x = scheduler.step(network(scale(x, t), t), t, x, return_dict=False)[0]
    try:
        assert_follows(scheduler, scheduler.timesteps[5:])  # works if the scheduler has no history
    except NotLinear as error:
        assert "in the middle of a run; call set_timesteps first" in str(error)  # noqa: PT017
    for steps in (11, 11, 6):
        scheduler.set_timesteps(steps)
        assert_follows(scheduler)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"eta": 0.3}),
        ("DDIMScheduler", {"eta": 1.0, "use_clipped_model_output": True}),
        ("TCDScheduler", {"eta": 0.0}),
        ("TCDScheduler", {"eta": 1.0}),
        ("EulerDiscreteScheduler", {"s_churn": 5.0}),
        ("EulerDiscreteScheduler", {"s_churn": 40.0, "s_noise": 1.01, "s_tmin": 0.05, "s_tmax": 8}),
        ("FlowMatchHeunDiscreteScheduler", {"s_churn": 40.0, "s_tmax": 0.8}),
    ],
    ids=str,
)
def test_step_options(name, options):
    scheduler = make(name)
    scheduler.set_timesteps(12)
    assert_follows(scheduler, **options)


def test_step_options_are_part_of_the_table():
    scheduler = make("DDIMScheduler")
    scheduler.set_timesteps(10)
    plain, noisy = probe(scheduler), probe(scheduler, {"eta": 0.8})
    assert not any(plain.draws)
    assert all(noisy.draws[:-1])
    assert float(noisy.noises.abs().max()) > 0.01
    assert probe(scheduler) is plain  # cached


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "options", "step"),
    [
        ("DDPMScheduler", {}, {}),
        ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample_range": 0.3}, {}),
        ("DDIMScheduler", {}, {}),
        ("DDIMScheduler", {"clip_sample_range": 100.0}, {"eta": 0.5}),
        ("DDIMScheduler", {}, {"eta": 1.0, "use_clipped_model_output": True}),
        ("LCMScheduler", {}, {}),
    ],
    ids=str,
)
def test_schedulers_that_clip_the_clean_picture(name, options, step, prediction):
    scheduler = make(name, clip_sample=True, prediction_type=prediction, **options)
    for steps in (1, 4, 25):
        scheduler.set_timesteps(steps)
        assert_follows_or_cannot_run(scheduler, **step)
    assert bool(probe(scheduler, step).clips.any())


def test_a_config_of_another_scheduler():
    """The config turns thresholding on, which this scheduler does not have."""
    config = make("DPMSolverMultistepScheduler", thresholding=True).config
    scheduler = type(make("EulerDiscreteScheduler")).from_config(config)
    assert scheduler.config["thresholding"]
    scheduler.set_timesteps(7)
    assert_follows(scheduler)


THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.77, "sample_max_value": 1.6}


@pytest.mark.parametrize(
    ("name", "options", "step"),
    [
        ("DDPMScheduler", THRESHOLD | {"prediction_type": "v_prediction"}, {}),
        ("DDIMScheduler", THRESHOLD, {"eta": 0.5, "use_clipped_model_output": True}),
        ("DDIMScheduler", {"thresholding": True}, {}),
        ("LCMScheduler", THRESHOLD | {"sample_max_value": 50.0}, {}),
        ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
        ("DDPMScheduler", {"variance_type": "learned_range", "clip_sample": True}, {}),
        ("DDPMScheduler", THRESHOLD | {"variance_type": "learned_range"}, {}),  # DeepFloyd's
        ("UnCLIPScheduler", {"variance_type": "learned_range"}, {}),
        ("UnCLIPScheduler", {"prediction_type": "sample", "clip_sample_range": 0.4}, {}),
        ("UnCLIPScheduler", {"clip_sample": False}, {}),
    ],
    ids=str,
)
def test_schedulers_that_threshold_or_read_a_learned_variance(name, options, step):
    scheduler = make(name, **options)
    for steps in (2, 9):
        scheduler.set_timesteps(steps)
        if name == "UnCLIPScheduler":
            step = {"prev_timestep": following(scheduler.timesteps)}
        assert_follows(scheduler, **step)
    table = probe(scheduler, step)
    assert table.thresholds == ("thresholding" in options)
    assert table.variance == (options.get("variance_type") == "learned_range")


def test_a_clipped_schedule_that_begins_with_pure_noise():
    """alpha is 0 in the first step, where a prediction of the noise is divided by sqrt(alpha)."""
    schedule = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for prediction in ("sample", "v_prediction", "epsilon"):
        options = schedule | {"clip_sample": True, "prediction_type": prediction}
        scheduler = make("DDPMScheduler", **options)
        scheduler.set_timesteps(5)
        if prediction == "epsilon":
            with pytest.raises(NotLinear, match="not finite"):
                probe(scheduler)
        else:
            assert_follows(scheduler)


def test_a_clipped_step_of_a_sample_that_is_not_finite():
    """NaN stays NaN and infinity is clipped, as in diffusers."""
    scheduler = make("DDPMScheduler", clip_sample=True)
    scheduler.set_timesteps(4)
    row = probe(scheduler).rows()
    x = torch.tensor([float("nan"), float("inf"), 0.5]).double()[None]
    output, following = torch.zeros(1, 3).double(), torch.zeros(1, 3).double()
    own = scheduler.step(output, scheduler.timesteps[0], x.clone(), torch.Generator()).prev_sample
    guided_step(output, x, x.new_zeros(2, 0, 1, 3), following, row, torch.tensor([0]), None)
    assert own.isnan().tolist() == x.isnan().tolist() == [[True, False, False]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("HeunDiscreteScheduler", {"clip_sample": True}),
        ("DDPMScheduler", {"variance_type": "learned"}),
        ("UniPCMultistepScheduler", {"thresholding": True}),
        ("DPMSolverMultistepScheduler", {"thresholding": True}),
    ],
)
def test_other_kinds_of_clipping_are_refused(name, options):
    scheduler = make(name, **options)
    for steps in (4, 25):
        scheduler.set_timesteps(steps)
        with pytest.raises(NotLinear):
            probe(scheduler)


def test_the_depth_of_the_history_is_the_schedulers_own():
    """A probe must not fit rounding errors with a deeper history."""
    depths = {
        ("EulerDiscreteScheduler", "epsilon"): 0,
        ("EulerDiscreteScheduler", "v_prediction"): 0,
        ("EulerDiscreteScheduler", "sample"): 0,
        ("DPMSolverMultistepScheduler", "epsilon"): 1,
        ("DPMSolverMultistepScheduler", "v_prediction"): 1,
        ("LMSDiscreteScheduler", "epsilon"): 3,
    }
    for (name, prediction), depth in depths.items():
        scheduler = getattr(diffusers, name)(**BETAS, prediction_type=prediction)
        scheduler.set_timesteps(25)
        assert probe(scheduler).depth == depth, (name, prediction)


def test_a_changed_schedule_is_probed_again():
    scheduler = make("DDIMScheduler")
    scheduler.set_timesteps(5)
    before = probe(scheduler)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.3
    assert not torch.equal(probe(scheduler).outputs, before.outputs)


def test_probing_leaves_the_scheduler_as_it_was():
    scheduler = make("UniPCMultistepScheduler")
    scheduler.set_timesteps(8)
    before = copy.deepcopy(vars(scheduler))
    probe(scheduler)
    assert before["_step_index"] == scheduler._step_index
    assert before["model_outputs"] == scheduler.model_outputs


@pytest.fixture
def trusted(monkeypatch):
    """Probe users' schedulers as if they were diffusers' own: a later diffusers may contain such
    steps."""
    monkeypatch.setattr(schedulers, "refuse_foreign", lambda scheduler: None)


class InPlace(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        moved = super().step(model_output, timestep, sample, **options)
        model_output.zero_()
        return (sample.copy_(moved[0]),)


@pytest.mark.usefixtures("trusted")
def test_a_step_may_work_in_place():
    scheduler = InPlace(**BETAS, clip_sample=False)
    scheduler.set_timesteps(9)
    assert_follows(scheduler)


class Overridden(diffusers.DDIMScheduler):
    """Its step applies `change` to the usual result."""

    change = None

    def step(self, model_output, timestep, sample, **options):
        moved = super().step(model_output, timestep, sample, **options)[0]
        return (type(self).change(moved, sample),)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(
    "change",
    {
        "a number of the whole batch": lambda moved, x: moved / x.norm(),
        "a number of each sample": lambda moved, x: moved / x.std((1, 2, 3), keepdim=True),
        "its neighbours": lambda moved, x: moved + 0.1 * x.roll(1, dims=-1),
        "a mean over the sample": lambda moved, x: moved - 0.1 * x.mean(),
        "an offset": lambda moved, x: moved + 1e-3,
        "a branch": lambda moved, x: moved if x.abs().max() < 50 else moved / 2,
        "a value": lambda moved, x: moved * (1 + float(x.flatten()[0])),
        "an array": lambda moved, x: torch.from_numpy(moved.numpy() * 2),
        "a lopsided clip": lambda moved, x: moved.clamp(-40, 50),
        "two clips": lambda moved, x: moved.clamp(-40, 40) + x.clamp(-1, 1),
        "its sign": lambda moved, x: moved.abs(),
        "a power": lambda moved, x: moved + 1e-4 * moved**2,
        "noise of its own": lambda moved, x: moved + torch.randn_like(moved),
        "noise without effect": lambda moved, x: moved + 0 * torch.rand(1),
        "another shape": lambda moved, x: moved[:, :1],
        "a division by zero": lambda moved, x: moved / 0,
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_step_that_is_not_linear_is_refused(change):
    """Each error is one sentence, and probing does not change torch's random state."""
    scheduler = type("Overridden", (Overridden,), {"change": staticmethod(change[1])})(
        **BETAS, clip_sample=False
    )
    scheduler.set_timesteps(6)
    before = torch.get_rng_state()
    with pytest.raises(NotLinear) as caught:
        probe(scheduler)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(caught.value).startswith("Overridden: ")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("trusted")
def test_scaling_that_is_not_linear_is_refused():
    class Clipping(diffusers.EulerDiscreteScheduler):
        def scale_model_input(self, sample, timestep):
            return super().scale_model_input(sample, timestep).clamp(-20, 20)

    scheduler = Clipping(**BETAS)
    scheduler.set_timesteps(6)
    with pytest.raises(NotLinear, match="scale_model_input"):
        probe(scheduler)


def test_a_replaced_step_is_refused_and_not_run():
    scheduler = make("EulerDiscreteScheduler")
    scheduler.set_timesteps(6)
    own = scheduler.step
    scheduler.step = lambda *args, **options: own(*args, **options)
    with pytest.raises(NotLinear, match="step is not its library's own"):
        probe(scheduler)
    assert scheduler._step_index is None


@pytest.mark.parametrize("name", NAMES + FLOW)
def test_attributes_that_steps_change_are_known(name):
    """The table has the plain attributes that a real run changes, and names the others."""
    scheduler = make(name)
    scheduler.set_timesteps(5)
    table = probe(scheduler)
    x = first_sample(scheduler)
    kept = set()
    for t, state in zip(scheduler.timesteps, table.states, strict=True):
        before = {key: digest_of(value) for key, value in vars(scheduler).items()}
        scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
        x = scheduler.step(network(scale(x, t), t), t, x, return_dict=False)[0]
        after = {key: digest_of(value) for key, value in vars(scheduler).items()}
        assert {key: vars(scheduler)[key] for key in state} == state
        kept |= {key for key in after if key not in state and before.get(key) != after[key]}
    assert kept <= set(table.keeps)
    assert bool(kept) == bool(table.keeps)


def test_without_timesteps_there_is_no_table():
    scheduler = make("EulerDiscreteScheduler")
    scheduler.set_timesteps(6)
    with pytest.raises(NotLinear, match="call set_timesteps first"):
        probe(scheduler, timesteps=scheduler.timesteps[6:])


def test_longer_histories_are_refused():
    scheduler = make("PNDMScheduler", skip_prk_steps=False)  # Runge-Kutta: four calls to a step
    scheduler.set_timesteps(20)
    with pytest.raises(NotLinear, match="depth 3"):
        probe(scheduler)


@pytest.mark.usefixtures("trusted")
def test_cached_tables_are_not_confused():
    """With functions and classes of the same name, tensors inside lists, and refusals."""
    table = {}
    for tau in (0.0, 0.5, 1.0):  # each function may have the address of the last one
        scheduler = make("SASolverScheduler", tau_func=lambda t, tau=tau: tau)
        scheduler.set_timesteps(8)
        table[tau] = probe(scheduler)
        del scheduler
    assert not table[0.0].noises.any()
    assert 0 < float(table[0.5].noises.abs().max()) < float(table[1.0].noises.abs().max())

    for factor in (2.0, 3.0):
        change = {"change": staticmethod(lambda moved, x, factor=factor: factor * moved)}
        scheduler = type("Overridden", (Overridden,), change)(**BETAS, clip_sample=False)
        scheduler.set_timesteps(5)
        assert_follows(scheduler)

    class Listed(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **options):
            moved = super().step(model_output, timestep, sample, **options)
            return (moved[0] * self.factors[0],)

    for factor in (1.0, 1.000000001):  # printed, they look the same
        scheduler = Listed(**BETAS, clip_sample=False)
        scheduler.set_timesteps(5)
        scheduler.factors = [torch.tensor(factor, dtype=torch.float64)]
        assert_follows(scheduler)

    scheduler = make("UniPCMultistepScheduler", thresholding=True)
    scheduler.set_timesteps(5)
    for _ in range(2):
        with pytest.raises(NotLinear, match="UniPCMultistepScheduler: it thresholds"):
            probe(scheduler)


def test_another_default_device_changes_nothing():
    scheduler = make("UniPCMultistepScheduler")
    scheduler.set_timesteps(7)
    with torch.device("meta"):
        table = probe(scheduler)
    assert table.outputs.device.type == "cpu"
    assert (
        relative_error(table_loop(table, scheduler)[0], own_loop(scheduler, table.timesteps, {})[0])
        < 1e-10
    )
