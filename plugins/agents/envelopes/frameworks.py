"""Frameworks that agents are built with, and front ends for people: what they write themselves.

Seen in LangChain 1.5, smolagents 1.26, Pydantic AI 2.68, AutoGen 0.7, CrewAI 1.15, LlamaIndex 0.14
and Open WebUI 0.12; those of LibreChat are from memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from plugins.agents.envelopes.shape import Agent

_RAG = "### Task:\nRespond to the user query using the provided context"
_HISTORY = ("<chat_history>", "### Chat History", "<prompt>")


def task_of_open_webui(text: str) -> bool:
    """Whether Open WebUI asks for a title, tags, a query or the like, about the conversation."""
    if not text.startswith("### Task:") or text.startswith(_RAG):
        return False
    return "### Output" in text and any(mark in text for mark in _HISTORY)


def asked_with_context(text: str) -> str | None:
    """What the person asked, after what Open WebUI found for it."""
    if not text.startswith(_RAG):
        return None
    *_, asked = text.rpartition("</context>")
    asked = asked.strip()
    if asked.startswith("<user_query>"):
        asked = asked.removeprefix("<user_query>").removesuffix("</user_query>").strip()
    return asked


AGENTS: Sequence[Agent] = (
    Agent(
        "open_webui",
        first_words=(_RAG,),
        side=task_of_open_webui,
        side_asked=("Your task is to reflect the speaker's likely facial expression",),
        shared=asked_with_context,
        housekeeping=("History:\nUSER:", "Query: History:\nUSER:"),
    ),
    Agent(
        "librechat",
        side_system=("Please generate a concise, 5-word-or-less title",),
        side_asked=(
            "Please generate a concise, 5-word-or-less title",
            "Provide a concise, 5-word-or-less title for the conversation",
            "Analyze this conversation and provide:",
        ),
    ),
    Agent(
        "smolagents",
        signs=("You are an expert assistant who can solve any task",),
        led=("New task:\n",),
        housekeeping=(
            "Calling tools:",
            "Here is your task:",
            "Now proceed and carry out this task!",
            "Now write your updated plan",
            "Based on the above, please provide an answer to the following user task:",
        ),
        observations=(
            "Observation:",
            "Error:\n",
            "Error in code parsing:",
            "Call id:",
            "Now let's retry: take care not to repeat previous errors!",
        ),
    ),
    Agent(
        "react",
        signs=("Action Input:", "\nObservation:", "Thought/Action/Action Input/Observation"),
        housekeeping=(
            "Now it's time you MUST give your absolute best final answer",
            "TOOL RESPONSE:",
            "Begin! This is VERY important to you",
        ),
        observations=(
            "Observation:",
            "Invalid Format:",
            "Could not parse LLM output",
            "Invalid or incomplete response",
            "I did it wrong.",
            "Sorry, I didn't use the right format.",
            "I encountered an error while trying to use the tool.",
            "I tried reusing the same input, I must stop using this action input.",
        ),
    ),
    Agent(
        "pydantic_ai",
        housekeeping=("Plain text responses are not permitted",),
        observations=(
            "Validation feedback:",
            "Please return text or",
            "Please include your response in a tool call",
            "Unknown tool name:",
        ),
    ),
    Agent(
        "autogen",
        signs=('Reply "TERMINATE"', "Reply TERMINATE"),
        housekeeping=(
            "No code blocks found in the thread.",
            "Read the above conversation. Then select",
        ),
        observations=(
            "exitcode:",
            "The script ran, then exited with",
            "The script ran but produced no output to console.",
        ),
    ),
    Agent(
        "llama_index",
        side_asked=(
            "Given a conversation (between Human and Assistant) and a follow up message",
            "Given the following conversation between a user and an AI assistant and a follow up",
        ),
        housekeeping=("Context information is below.",),
    ),
    Agent(
        "langchain",
        side_asked=(
            "Given the following conversation and a follow up question, rephrase",
            "Progressively summarize the lines of conversation provided",
            "Extract the most important context from",
        ),
    ),
)
