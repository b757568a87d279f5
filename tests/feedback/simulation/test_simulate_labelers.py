"""`simulate-labelers` judges a whole project over HTTP."""

from collections import Counter

import pytest
from django.core.management import CommandError, call_command

from openpalm.cli.main import main
from openpalm.feedback.models import ApiToken, Item, Membership, Response, User


@pytest.fixture
def site(live_server):
    return live_server.url


def labelers(project, tmp_path, capsys, count=3):
    call_command("create_labelers", project.slug, count=count)
    file = tmp_path / "tokens.txt"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    return file


def simulate(site, project, file, *words):
    return main(
        [
            "simulate-labelers",
            "--url",
            site,
            "--project",
            project.slug,
            "--token-file",
            str(file),
            *map(str, words),
        ]
    )


@pytest.mark.django_db(transaction=True)
def test_all_items_are_judged_and_marked(site, project, make_item, tmp_path, capsys):
    for n in range(4):
        make_item(f"What is {n}?", f"It is {n}.", "Whatever.", needed=2)
    file = labelers(project, tmp_path, capsys)
    assert simulate(site, project, file, "--labelers", 2, "--count", 3) == 0
    assert "3 judgements by 2 simulated labelers" in capsys.readouterr().out
    assert simulate(site, project, file, "--noise", 0) == 0
    assert "5 judgements by 3" in capsys.readouterr().out
    assert Counter(Response.objects.values_list("item", flat=True)) == dict.fromkeys(
        Item.objects.values_list("id", flat=True), 2
    )
    assert set(Response.objects.values_list("author_kind", flat=True)) == {"simulated"}


@pytest.mark.django_db(transaction=True)
def test_refusals_are_one_line(site, project, tmp_path, capsys):
    file = labelers(project, tmp_path, capsys, count=1)
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("opf_wrong\n", encoding="utf-8")
    for words, line in (
        ((file, "--labelers", 2), "has 1 token for 2 labelers; give --labelers 1"),
        ((file, "--taste", "sour"), "--taste sour: must be one of exact, warm, brief"),
        ((file, "--noise", 0.7), "--noise 0.7: must be from 0 to 0.5"),
        ((tmp_path / "none.txt",), "none.txt"),
        ((wrong, "--labelers", 1), "HTTP 401: this token is unknown"),
    ):
        assert simulate(site, project, *words) in (1, 2)
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1


def test_labelers_are_no_people_and_cannot_sign_in(project, capsys):
    call_command("create_labelers", "demo", count=2)
    call_command("create_labelers", "demo", count=2)
    made = User.objects.filter(kind="simulated")
    assert made.count() == Membership.objects.filter(user__in=made).count() == 2
    assert not any(user.has_usable_password() for user in made)
    assert set(ApiToken.objects.values_list("project", flat=True)) == {project.pk}
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_person_is_not_turned_into_a_simulation(project, member):
    member("ann-1")
    with pytest.raises(CommandError, match="ann-1 is a person"):
        call_command("create_labelers", "demo", prefix="ann")
