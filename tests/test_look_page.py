"""The page of extras.look in a real browser: headless Chromium, driven by Selenium."""

import json
import math
import shutil

import pytest
import torch

import sample
from extras import look
from model import GPTConfig, MiniGPT
from support.tokenizer import ByteTokenizer

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"><!-- {data} -->\u2028'
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def make_model(**changes):
    torch.manual_seed(0)
    sizes = {"block_size": 128, "vocab_size": 256, "n_layer": 3, "n_head": 2, "n_embd": 32}
    model = MiniGPT(GPTConfig(**(sizes | changes))).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def open_page(browser, tmp_path):
    """open_page(model, prompt, new=0) opens the page; returns the token ids of its text."""

    def open_page(model, prompt, new=0):
        path = tmp_path / "look.html"
        s = look.Settings(prompt=[prompt], max_new_tokens=new)
        look.write_page(model, ByteTokenizer(), "a model", s, path)
        browser.get_log("performance")
        browser.get_log("browser")
        browser.get(path.as_uri())
        return torch.tensor(browser.execute_script("return data.ids"))

    return open_page


def press(browser, *keys):
    for key in keys:
        webdriver.ActionChains(browser).send_keys(key).perform()


def current(browser):
    """The place of the token that is marked in the text."""
    marked = "return [...document.querySelectorAll('#text span')].map(b => b.className)"
    classes = browser.execute_script(marked)
    places = [i for i, names in enumerate(classes) if "current" in names.split()]
    assert len(places) == 1
    return places[0]


def go_to(browser, place):
    keys = webdriver.Keys
    press(browser, keys.HOME, *([keys.ARROW_RIGHT] * place))


def set_slider(browser, name, value):
    script = """const input = document.getElementById(arguments[0]);
        input.value = arguments[1];
        input.dispatchEvent(new Event("input", { bubbles: true }));"""
    browser.execute_script(script, name, value)


def bars(browser):
    """[(rank, text, percentage, width in percent, class name)] of the bars on the page."""
    script = """return [...document.querySelectorAll("#bars tr")].map((row) => [
        ...[0, 1, 3].map((i) => row.cells[i].textContent),
        row.querySelector("i").style.width, row.className])"""
    rows = browser.execute_script(script)
    return [
        (rank, text, float(percent.strip("%")), float(width.strip("%")), name)
        for rank, text, percent, width, name in rows
    ]


def test_the_page_needs_no_network_and_has_no_error(browser, open_page):
    ids = open_page(make_model(), "To be, or not", new=20)
    assert len(ids) == 33
    requests = []
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        params = event["params"]
        sends = event["method"] == "Network.requestWillBeSent"
        if sends and params["documentURL"] == browser.current_url:
            requests.append(params["request"]["url"])
    assert [url for url in requests if not url.startswith("data:")] == [browser.current_url]
    assert browser.get_log("browser") == []


SLIDERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_p": 0.8},
    {"temperature": 2.0, "top_k": 4},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.5},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("settings", SLIDERS)
@pytest.mark.parametrize("vocab_size", [256, 40])
def test_the_bars_are_next_token_probs(browser, open_page, settings, vocab_size):
    model = make_model(vocab_size=vocab_size)
    prompt = "".join(map(chr, range(1, 30)))
    ids = open_page(model, prompt)
    logits = model(ids[None])[0][0]
    for name, value in settings.items():
        set_slider(browser, name, value)
    for place in (1, 12, 29):  # the last one is what would come next
        go_to(browser, place)
        assert current(browser) == place
        probs = sample.next_token_probs(logits[place - 1], **settings)
        order = logits[place - 1].argsort(descending=True).tolist()
        *shown, others = bars(browser)
        for rank, _, percent, width, name in shown:
            token = order[int(rank) - 1]
            assert percent / 100 == pytest.approx(probs[token].item(), abs=1e-3)
            assert width == pytest.approx(percent, abs=0.01)
            assert (name == "actual") == (place < 29 and token == ids[place])
        assert [int(rank) for rank, *_ in shown][:10] == list(range(1, 11))
        assert sum(percent for _, _, percent, _, _ in [*shown, others]) == pytest.approx(100, abs=1)


def test_surprise_rank_and_entropy_are_those_of_the_model(browser, open_page):
    model = make_model()
    ids = open_page(model, "To be, or not to be")
    go_to(browser, 5)
    log_probs = model(ids[None])[0][0, 4].log_softmax(0) / math.log(2)
    surprise = -log_probs[ids[5]].item()
    rank = (log_probs > log_probs[ids[5]]).sum().item() + 1
    entropy = -(log_probs.exp2() * log_probs).sum().item()
    text = browser.find_element("id", "current").text
    assert f"Surprise {surprise:.2f} bits" in text
    assert f"rank {rank} of 256" in text
    assert f"Entropy {entropy:.2f} bits" in text
    box = browser.find_element("id", "token5")
    amount = float(
        browser.execute_script("return arguments[0].style.getPropertyValue('--amount')", box)
    )
    assert amount == pytest.approx(min(1, surprise / 8), abs=1e-3)


@pytest.mark.parametrize("way", ["from", "to"])
def test_the_attention_shown_is_the_formula(browser, open_page, way):
    model = make_model()
    ids = open_page(model, "To be, or not to be")
    inputs = []
    model.h[1].attn.register_forward_hook(lambda module, args, y: inputs.append(args[0]))
    model(ids[None])
    qkv = model.h[1].attn.c_attn(inputs[0])[0].view(len(ids), 3, 2, 16)
    q = qkv[:, 0, 1]
    k = qkv[:, 1, 1]  # of head 1
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    weights = (q @ k.T / math.sqrt(16) + mask).softmax(1)

    go_to(browser, 7)
    browser.execute_script("document.querySelector('[title=\"layer 1, head 1\"]').click()")
    browser.find_element("css selector", f"[name=way][value={way}]").click()
    script = """return [...document.querySelectorAll("#text span")].map(
        (box) => Number(box.style.getPropertyValue("--amount")))"""
    amounts = torch.tensor(browser.execute_script(script))
    expected = weights[7] if way == "from" else weights[:, 7]
    strongest = expected.max()
    torch.testing.assert_close(amounts[:-1] * strongest, expected, atol=1 / 255, rtol=0)
    percentage = browser.find_element("id", "legend").text.split()[-1]
    assert float(percentage.strip("%")) / 100 == pytest.approx(strongest.item(), abs=1 / 255)
    said = browser.find_element("id", "head").text
    assert "layer 1, head 1" in said
    previous = weights.diagonal(-1).mean().item()
    assert f"on average {previous:.0%}"[:-2] in said


def test_what_layers_say_is_the_head_on_their_output(browser, open_page):
    model = make_model()
    ids = open_page(model, "To be, or not to be")
    x = model.wte(ids) + model.wpe(torch.arange(len(ids)))
    x = x[None]
    for layer, block in enumerate(model.h):
        x = block(x)
        probs_of_all = (model.ln_f(x)[0] @ model.wte.weight[:256].T).softmax(1)
        probs = probs_of_all[4]
        p, token = probs.max(0)
        row = browser.find_elements("css selector", "#table tr")[3 + layer]
        name, *cells = row.find_elements("css selector", "th, td")
        right = (probs_of_all.argmax(1)[:-1] == ids[1:]).float().mean().item()
        assert name.text == f"layer {layer} says ({100 * right:.0f}% right)"
        text = cells[5].get_attribute("textContent")
        assert text.endswith(f"{p:.1%}")
        assert text.startswith(look.visible(bytes([token])).replace(" ", "␣"))


def test_keys_and_clicks_move_and_pin(browser, open_page):
    keys = webdriver.Keys
    open_page(make_model(), "To be, or not to be")
    press(browser, keys.HOME)
    assert current(browser) == 0
    assert "was not predicted" in browser.find_element("id", "current").text
    press(browser, keys.ARROW_RIGHT, keys.ARROW_RIGHT, keys.ARROW_LEFT)
    assert current(browser) == 1
    press(browser, keys.END, keys.ARROW_RIGHT)
    assert current(browser) == 19
    mouse = webdriver.ActionChains(browser)
    mouse.move_to_element(browser.find_element("id", "token4")).perform()
    assert current(browser) == 4
    press(browser, keys.ENTER)
    mouse.move_to_element(browser.find_element("id", "token8")).perform()
    assert current(browser) == 4  # pinned
    browser.find_element("id", "token9").click()
    mouse.move_to_element(browser.find_element("id", "token2")).perform()
    assert current(browser) == 9
    press(browser, keys.ESCAPE)
    mouse.move_to_element(browser.find_element("id", "token3")).perform()
    assert current(browser) == 3
    mouse.move_to_element(browser.find_element("tag name", "h1")).perform()
    assert current(browser) == 9  # the one that was chosen
    # the heads and the sliders by keys alone
    browser.execute_script("document.querySelector('[name=head]').focus()")
    press(browser, keys.ARROW_RIGHT)
    assert "layer 0, head 0" in browser.find_element("id", "head").text
    press(browser, keys.ARROW_DOWN)
    assert "layer 1, head 0" in browser.find_element("id", "head").text
    browser.execute_script("document.getElementById('temperature').focus()")
    press(browser, keys.ARROW_LEFT)
    assert browser.find_element("css selector", "#temperature + output").text == "0.9"
    assert current(browser) == 9


def test_a_hostile_text_is_shown_and_runs_nothing(browser, open_page):
    open_page(make_model(), HOSTILE)
    go_to(browser, 3)
    assert browser.get_log("browser") == []  # an alert would make the calls above fail, too
    counts = "return ['script', 'img'].map((tag) => document.getElementsByTagName(tag).length)"
    assert browser.execute_script(counts) == [2, 0]
    script = "return [...document.querySelectorAll('#text span')].map((box) => box.textContent)"
    boxes = browser.execute_script(script)
    shown = "".join(boxes[:-1]).replace("␣", " ")
    assert shown == HOSTILE.replace("\u2028", "\\xe2\\x80\\xa8")


@pytest.mark.parametrize("width", [320, 1280])
def test_the_page_fits_its_window(browser, open_page, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    open_page(make_model(n_layer=12, n_head=8), "To be, or not to be", new=80)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_text_of_one_token_has_a_page(browser, open_page):
    open_page(make_model(n_layer=1, n_head=1), "T")
    assert current(browser) == 1
    assert browser.get_log("browser") == []
