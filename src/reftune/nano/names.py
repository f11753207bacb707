"""First names of the actors in sums, passages, stories and guided answers.

Sub-world B (facts) builds its people from another pool and must avoid these names, so that no
sum or story can contradict a fact.
"""

from __future__ import annotations

ACTORS: tuple[str, ...] = (
    "Ada", "Alma", "Amir", "Anna", "Ben", "Bill", "Carl", "Cleo", "Dan", "Dora",
    "Eli", "Emma", "Eric", "Eva", "Finn", "Flora", "Fred", "Gina", "Grace", "Hana",
    "Hugo", "Ian", "Ida", "Iris", "Ivan", "Jack", "Jane", "Joel", "Julia", "Karl",
    "Kate", "Kim", "Lara", "Lea", "Leo", "Lily", "Lucas", "Luke", "Maria", "Mark",
    "Max", "Mia", "Milo", "Nina", "Noah", "Nora", "Olga", "Oscar", "Otto", "Paul",
    "Pia", "Rita", "Rosa", "Ruth", "Sam", "Sara", "Theo", "Tom", "Uma", "Vera",
)  # fmt: skip
"""Sixty short first names, in a fixed order."""
