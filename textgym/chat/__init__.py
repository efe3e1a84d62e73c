"""Conversations: messages, chat templates, and what opens and ends a turn."""
