"""Memories are ranked by meaning, even if no query shares key words with its answer; and found by names and numbers."""

import httpx

MEMORIES = {
    "allergy": "Anna breaks out in hives whenever she eats peanuts.",
    "car": "Our old station wagon needs new brake pads before winter.",
    "birthday": "Grandfather turns eighty on the third of May.",
    "flight": "The plane to Lisbon leaves at six in the morning from gate B12.",
    "doctor": "Dr. Weiss prescribed 20 mg of blood pressure medicine.",
    "piano": "Leo practises Chopin nocturnes every evening.",
    "garden": "The tomatoes in the greenhouse were eaten by slugs.",
    "salary": "My monthly pay was raised to 4,200 euros in March.",
    "database": "We moved the production tables from MySQL to PostgreSQL.",
    "dog": "Rex the spaniel is afraid of thunder.",
    "coffee": "She takes her espresso without sugar.",
    "school": "The parent-teacher meeting takes place in room 204.",
    "marathon": "I ran forty-two kilometres in under four hours.",
    "wine": "They bought a case of Burgundy for the wedding.",
    "rent": "The landlord wants the money on the first of each month.",
    "physics": "Entropy of an isolated system never decreases.",
    "kubernetes": "Two pods were evicted because the node ran out of memory.",
    "film": "We watched a horror movie about a haunted lighthouse.",
    "language": "Mia is learning Japanese kanji with flash cards.",
    "password": "The Wi-Fi key is written on the back of the router.",
    "train": "The night sleeper from Vienna to Rome has couchettes.",
    "recipe": "Knead the dough for ten minutes and let it rise overnight.",
    "shares": "He sold his stocks the day before the crash.",
    "glasses": "The optician says my eyesight got worse by half a dioptre.",
    "snow": "The ski lifts open in the second week of December.",
    "lawyer": "Our attorney filed the appeal against the verdict.",
    "baby": "The twins were born at three in the morning.",
    "chess": "Carlsen sacrificed his queen on move twenty-four.",
    "bees": "The hive produced eleven jars of honey this summer.",
    "moon": "Apollo astronauts brought back rocks in 1969.",
}
QUERIES = {
    "Which foods must be kept away from Anna?": "allergy",
    "vehicle maintenance": "car",
    "When do I have to be at the airport?": "flight",
    "How much do I earn?": "salary",
    "Which SQL system do we use?": "database",
    "What scares our pet?": "dog",
    "baking bread": "recipe",
    "wireless network access": "password",
    "court case": "lawyer",
    "lunar exploration": "moon",
}

TYPED = {
    "gate B12": "flight",
    "What is Rex afraid of?": "dog",
    "dr weiss": "doctor",
    "room 204": "school",
    "carlsen": "chess",
}


def test_the_best_match_is_the_memory_that_was_meant(http: httpx.Client) -> None:
    items = [{"id": key, "text": text} for key, text in MEMORIES.items()]
    assert http.post("/v1/users/reader/memories", json={"memories": items}).status_code == 201
    right = 0
    for query, expected in QUERIES.items():
        body: dict[str, object] = {"query": query, "mode": "vector", "top_k": 3}
        answer = http.post("/v1/users/reader/memories/search", json=body).json()
        scores = [memory["score"] for memory in answer["results"]]
        assert scores == sorted(scores, reverse=True)
        right += answer["results"][0]["id"] == expected
    assert right >= 9
    for query, expected in TYPED.items():
        for mode in ("words", "hybrid"):
            body = {"query": query, "mode": mode, "top_k": 3}
            answer = http.post("/v1/users/reader/memories/search", json=body).json()
            assert answer["results"][0]["id"] == expected
