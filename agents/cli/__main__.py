"""``python -m textgym.agents.cli``, as ``accelerate launch -m`` starts it."""

from textgym.agents.cli.command import main

main()
