"""The page of `ant-lightning app`, driven in headless Chromium: `make test-app`."""

import shutil

import numpy as np
import pytest

from ant_lightning.cli.app import make_app
from ant_lightning.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs with other seeds, one of which has a diagnosis."""
    pytest.importorskip("gradio")  # here, as its import takes seconds
    folder, found = tmp_path_factory.mktemp("runs"), []
    for seed in (0, 1):
        options = [f"--seed_everything={seed}", "--trainer.max_steps=5", "--ema.warmup=false"]
        options += ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
        options += ["--trainer.callbacks=[]", "--model.sampling.sampler.num_steps=4"]
        options += [f"--trainer.logger.init_args.save_dir={folder}"]
        options += [f"--trainer.logger.init_args.version=seed_{seed}"]
        assert main(["fit", "--config", "digits/dit", *options]) == 0
        found.append(next(folder.glob(f"*/seed_{seed}")))
    few = ["--num_points=6", "--num_images=8", "--timed_steps=0", "--trainer.logger=false"]
    assert main(["diagnose", str(found[0]), *few]) == 0
    return found


@pytest.fixture(scope="module")
def page(runs):
    playwright = pytest.importorskip("playwright.sync_api")
    app = make_app(runs)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True)
    with playwright.sync_playwright() as driver:
        found = shutil.which("chromium")
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)
        yield page
        browser.close()
    app.close()


def pixels(page, i):
    """The picture of a run, as the page shows it."""
    picture = page.locator(f"#run-{i} img")
    picture.wait_for(timeout=60_000)
    return picture.evaluate(
        """async img => { await img.decode(); const c = document.createElement('canvas');
        c.width = img.naturalWidth; c.height = img.naturalHeight;
        c.getContext('2d').drawImage(img, 0, 0);
        return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data) }"""
    )


def draw(page):
    before = (
        page.locator("#run-1 img").first.get_attribute("src")
        if (page.locator("#run-1 img").count())
        else ""
    )
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function(
        """before => { const img = document.querySelector('#run-1 img');
        return img && img.getAttribute('src') !== before }""",
        arg=before,
        timeout=120_000,
    )
    return [np.array(pixels(page, i)) for i in (0, 1)]


def test_two_runs_draw_side_by_side_and_the_controls_count(page):
    first = draw(page)
    assert first[0].std() > 1
    assert not np.array_equal(first[0], first[1])
    page.get_by_label("seed").fill("7")
    page.get_by_label("seed").press("Tab")
    other = draw(page)
    assert not np.array_equal(first[0], other[0])


def test_the_pictures_of_a_run_are_in_its_tab(page, runs):
    page.get_by_role("tab", name=f"{runs[0].parent.name}/{runs[0].name}").click()
    page.get_by_text("diagnosis_affinity").first.wait_for(timeout=30_000)
