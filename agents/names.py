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
    "agents.blueprint": ("LanguageModelBlueprint",),
    "agents.callbacks": ("AdaptiveKLCallback",),
    "agents.checkpoints": ("TrainingCheckpoints", "resume"),
    "agents.dpo": ("DPO",),
    "agents.early_stopping": ("StopOnKL",),
    "agents.episode_buffer": ("EpisodeBuffer", "Segment", "SegmentSamples"),
    "agents.episodes": ("TextEpisodeAlgorithm",),
    "agents.expert_iteration": ("ExpertIteration",),
    "agents.exploration": ("Explore",),
    "agents.grpo": ("GRPO",),
    "agents.imitation": ("WarmStartReport", "warm_start"),
    "agents.learning_rewards": ("LearningRewards",),
    "agents.losses": ("Loss",),
    "agents.nlpo": ("NLPO",),
    "agents.off_policy": ("TextOffPolicyAlgorithm",),
    "agents.on_policy": ("TextOnPolicyAlgorithm",),
    "agents.policy": ("LanguageModelPolicy",),
    "agents.ppo": ("PPO",),
    "agents.q_learning": ("QLearning",),
    "agents.reinforce": ("REINFORCE",),
    "agents.rloo": ("RLOO",),
    "agents.sarsa": ("SARSA",),
    "agents.saved_agent": ("TrustWarning",),
    "agents.soft_q_learning": ("SoftQLearning",),
    "agents.text_environment": ("TextEnvironment",),
    "agents.trpo": ("TRPO",),
    "checkpoint_folders": ("CheckpointError",),
    "divergence": ("DivergedError",),
}
HOME = {name: module for module, names in HOMES.items() for name in names}
