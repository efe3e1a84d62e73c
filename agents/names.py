"""Where the public names of :mod:`textgym.agents` are at home, and what the command line calls the agents.

Naming an agent imports nothing; using one imports its module. A new agent is a line in each table.
"""

from __future__ import annotations

# The command line's name of each agent, and its class.
AGENTS = {
    "ppo": "PPO",
    "a2c": "A2C",
    "reinforce": "REINFORCE",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "nlpo": "NLPO",
    "trpo": "TRPO",
    "softq": "SoftQLearning",
    "q": "QLearning",
    "sarsa": "SARSA",
    "expert": "ExpertIteration",
    "dpo": "DPO",
}

# The module of textgym, and the public names that are at home there.
HOMES = {
    "agents.a2c": ("A2C",),
    "agents.policy.blueprint": ("LanguageModelBlueprint",),
    "agents.callbacks.adaptive_kl": ("AdaptiveKLCallback",),
    "agents.callbacks.checkpoints": ("TrainingCheckpoints", "resume"),
    "agents.dpo": ("DPO",),
    "agents.callbacks.early_stopping": ("StopOnKL",),
    "agents.buffers.episode_buffer": ("EpisodeBuffer", "SegmentSamples"),
    "agents.common.whole_episodes": ("TextEpisodeAlgorithm",),
    "agents.expert_iteration": ("ExpertIteration",),
    "agents.common.exploration": ("Exploration",),
    "agents.grpo": ("GRPO",),
    "agents.imitation": ("WarmStartReport", "warm_start"),
    "agents.callbacks.learning_rewards": ("LearningRewards",),
    "agents.common.losses": ("Loss",),
    "agents.nlpo": ("NLPO",),
    "agents.common.off_policy": ("TextOffPolicyAlgorithm",),
    "agents.common.on_policy": ("TextOnPolicyAlgorithm",),
    "agents.policy.language_model_policy": ("LanguageModelPolicy",),
    "agents.ppo": ("PPO",),
    "agents.q_learning": ("QLearning",),
    "agents.reinforce": ("REINFORCE",),
    "agents.rloo": ("RLOO",),
    "agents.sarsa": ("SARSA",),
    "agents.common.saved_agent": ("TrustWarning",),
    "agents.soft_q_learning": ("SoftQLearning",),
    "agents.common.text_environment": ("TextEnvironment",),
    "agents.trpo": ("TRPO",),
    "envs.segments": ("Segment",),
    "checkpoint_folders": ("CheckpointError",),
    "divergence": ("DivergedError",),
}
HOME = {name: module for module, names in HOMES.items() for name in names}
