"""Where the public names of :mod:`textgym.agents` are at home, and what the command line calls the agents.

Naming an agent imports nothing; using one imports its module. A new agent is a line of the first table, and its import
for type checkers, which read no tables, in ``agents/__init__.py``.
"""

from __future__ import annotations

# Of each agent: what the command line calls it, its module of textgym, its class.
_AGENTS = (
    ("ppo", "agents.ppo", "PPO"),
    ("a2c", "agents.a2c", "A2C"),
    ("reinforce", "agents.reinforce", "REINFORCE"),
    ("rloo", "agents.rloo", "RLOO"),
    ("grpo", "agents.grpo", "GRPO"),
    ("nlpo", "agents.nlpo", "NLPO"),
    ("trpo", "agents.trpo", "TRPO"),
    ("softq", "agents.soft_q_learning", "SoftQLearning"),
    ("q", "agents.q_learning", "QLearning"),
    ("sarsa", "agents.sarsa", "SARSA"),
    ("expert", "agents.expert_iteration", "ExpertIteration"),
    ("dpo", "agents.dpo", "DPO"),
)
# What else is public: the module of textgym, and the names that are at home there.
_OTHERS = {
    "agents.buffers.episode_buffer": ("EpisodeBuffer", "SegmentSamples"),
    "agents.callbacks.adaptive_kl": ("AdaptiveKLCallback",),
    "agents.callbacks.checkpoints": ("TrainingCheckpoints", "resume"),
    "agents.callbacks.early_stopping": ("StopOnKL",),
    "agents.callbacks.learning_rewards": ("LearningRewards",),
    "agents.common.exploration": ("Exploration",),
    "agents.common.losses": ("Loss",),
    "agents.common.off_policy": ("TextOffPolicyAlgorithm",),
    "agents.common.on_policy": ("TextOnPolicyAlgorithm",),
    "agents.common.saved_agent": ("TrustWarning",),
    "agents.common.text_environment": ("TextEnvironment",),
    "agents.common.whole_episodes": ("TextEpisodeAlgorithm",),
    "agents.imitation": ("WarmStartReport", "warm_start"),
    "agents.policy.blueprint": ("LanguageModelBlueprint",),
    "agents.policy.language_model_policy": ("LanguageModelPolicy",),
    "checkpoint_folders": ("CheckpointError",),
    "divergence": ("DivergedError",),
    "envs.segments": ("Segment",),
}

AGENTS = {command: name for command, _, name in _AGENTS}
HOME = {name: module for module, names in _OTHERS.items() for name in names}
HOME |= {name: module for _, module, name in _AGENTS}
