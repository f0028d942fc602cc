"""Writes 300 made-up preference pairs of a shop's help desk, in the form in which UltraFeedback is published.

    python docs/support_pairs.py > pairs.jsonl

Each line has a prompt and two conversations, chosen and rejected, whose last turns differ: one that answers from the shop's
rules, and one that is vague, unkind or beside the question. Invented, to try the machinery with.
"""

from __future__ import annotations

import itertools
import json
import random

PRODUCTS = (
    *(
        "kettle",
        "toaster",
        "desk lamp",
        "backpack",
        "tent",
        "raincoat",
        "pair of boots",
        "bicycle helmet",
        "frying pan",
    ),
    *(
        "alarm clock",
        "radio",
        "garden hose",
        "sleeping bag",
        "coffee grinder",
        "suitcase",
        "wool blanket",
        "camera bag",
    ),
    *("kitchen scale", "table fan", "water bottle"),
)
# What customers ask, and what the shop's rules say.
QUESTIONS = (
    (
        "How long does it take until my {} arrives?",
        "Your {} ships within one working day and arrives in three days at most.",
    ),
    (
        "Can I send the {} back if I do not like it?",
        "Yes, you can return the {} within 30 days, and we pay the postage.",
    ),
    (
        "My {} arrived broken. What now?",
        "I am sorry. Send us a photo of the {} and we will ship a new one today, free of charge.",
    ),
    ("Is there a guarantee on the {}?", "Yes, the {} has a guarantee of two years from the day you bought it."),
    ("Do you sell spare parts for the {}?", "Yes, you find spare parts for the {} in our shop under its order number."),
    ("Can I pay for the {} in instalments?", "Yes, you can pay for the {} in three instalments without interest."),
    ("Do you ship the {} abroad?", "Yes, we ship the {} to all of Europe for a flat rate of nine euros."),
    (
        "May I change the colour of the {} that I ordered?",
        "Yes, tell us the colour within a day and we will change your {}.",
    ),
    ("How do I clean the {}?", "Wipe the {} with a damp cloth and mild soap, and let it dry in the air."),
    ("I lost the receipt of my {}. Is that a problem?", "No, we find your {} by your name and e-mail address."),
    ("Can I pick up the {} in your store?", "Yes, choose pick-up at the till and your {} is ready in two hours."),
    ("Is the {} in stock?", "Yes, the {} is in stock, and we reserve it for you for a day if you like."),
    ("Can you wrap the {} as a gift?", "Yes, we wrap the {} as a gift for two euros and add a card with your words."),
    (
        "My order of a {} has not come. Where is it?",
        "I am sorry. Tell me your order number and I will find your {} at once.",
    ),
    (
        "Do you have a discount on the {} for students?",
        "Yes, students get ten percent off the {} with the code STUDENT.",
    ),
)
POOR = (
    "I do not know. Look it up yourself.",
    "That depends on many things, and there are many opinions about a {}.",
    "A {} is a thing that many people have at home. It is nice to have one.",
    "Please do not write to us about your {}.",
    "Maybe. Maybe not. Ask again next week.",
)


def pairs() -> list[dict[str, object]]:
    """All pairs, in an order drawn once."""
    rng = random.Random(0)
    rows = []
    for product, (question, answer) in itertools.product(PRODUCTS, QUESTIONS):
        prompt = question.format(product)
        sides = {"chosen": answer.format(product), "rejected": rng.choice(POOR).format(product)}
        asked = {"role": "user", "content": prompt}
        turns = {side: [asked, {"role": "assistant", "content": text}] for side, text in sides.items()}
        rows.append({"prompt": prompt, **turns})
    rng.shuffle(rows)
    return rows


if __name__ == "__main__":
    for row in pairs():
        print(json.dumps(row))
