"""All rules over one run's history: findings in order of importance."""

from gpt.health.finding import Finding
from gpt.history import History


def diagnose(history: History) -> list[Finding]:
    """What is wrong with the run, most important first; an empty list for a healthy one."""
    return []
