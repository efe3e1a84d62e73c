"""Replies: who speaks behind the policy's turns."""

from textgym.replies.base import FunctionReply, Reply, ReplyResult, as_reply
from textgym.replies.errors import ReplyError

__all__ = ["FunctionReply", "Reply", "ReplyError", "ReplyResult", "as_reply"]
