"""The page of extras.look in a real browser: headless Chromium, driven by Selenium."""

import json
import math
import shutil

import pytest
import torch
from conftest import tiny_model

import sample
from extras import look
from support.tokenizer import ByteTokenizer

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)"><!-- {data} -->\u2028'
FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync "
FLAGS += "disable-background-networking disable-component-update"
TEXT = "To be, or not to be"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def make_model(**changes):
    return tiny_model(0.3, **({"block_size": 128, "vocab_size": 256, "n_layer": 3} | changes))


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
        webdriver.ActionChains(browser).send_keys(getattr(webdriver.Keys, key)).perform()


def point_at(browser, by, name):
    mouse = webdriver.ActionChains(browser)
    mouse.move_to_element(browser.find_element(by, name)).perform()


def text_of(browser, name):
    return browser.find_element("id", name).text


def boxes(browser, what):
    """what, in JavaScript, of each box of a token of the text."""
    script = "return [...document.querySelectorAll('#text span')].map((box) => {})"
    return browser.execute_script(script.replace("{}", what))


def current(browser):
    """The place of the token that is marked in the text."""
    (place,) = [i for i, is_it in enumerate(boxes(browser, "box.matches('.current')")) if is_it]
    return place


def go_to(browser, place):
    press(browser, "HOME", *(["ARROW_RIGHT"] * place))


def set_slider(browser, name, value):
    script = """const input = document.getElementById(arguments[0]);
        input.value = arguments[1];
        input.dispatchEvent(new Event("input", { bubbles: true }));"""
    browser.execute_script(script, name, value)


def bars(browser):
    """[[rank, text, percentage, width in percent, class name]] of the bars on the page."""
    script = """return [...document.querySelectorAll("#bars tr")].map((row) => [
        row.cells[0].textContent, row.cells[1].textContent, parseFloat(row.cells[3].textContent),
        parseFloat(row.querySelector("i").style.width), row.className])"""
    return browser.execute_script(script)


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
    (256, {}),
    (40, {}),
    (256, {"temperature": 1.7, "top_p": 0.8}),
    (40, {"temperature": 0.8, "top_k": 20, "top_p": 0.5}),
    (256, {"temperature": 0.0}),
]


@pytest.mark.parametrize("vocab_size, settings", SLIDERS)
def test_the_bars_are_next_token_probs(browser, open_page, settings, vocab_size):
    model = make_model(vocab_size=vocab_size)
    ids = open_page(model, "".join(map(chr, range(1, 30))))
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
        assert sum(bar[2] for bar in [*shown, others]) == pytest.approx(100, abs=1)


def test_surprise_rank_and_entropy_are_those_of_the_model(browser, open_page):
    model = make_model()
    ids = open_page(model, TEXT)
    go_to(browser, 5)
    log_probs = model(ids[None])[0][0, 4].log_softmax(0) / math.log(2)
    surprise = -log_probs[ids[5]].item()
    rank = (log_probs > log_probs[ids[5]]).sum().item() + 1
    entropy = -(log_probs.exp2() * log_probs).sum().item()
    text = text_of(browser, "current")
    assert f"Surprise {surprise:.2f} bits" in text
    assert f"rank {rank} of 256" in text
    assert f"Entropy {entropy:.2f} bits" in text
    amounts = boxes(browser, "Number(box.style.getPropertyValue('--amount'))")
    assert amounts[5] == pytest.approx(min(1, surprise / 8), abs=1e-3)


@pytest.mark.parametrize("way", ["from", "to"])
def test_the_attention_shown_is_the_formula(browser, open_page, way):
    model = make_model()
    ids = open_page(model, TEXT)
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
    amounts = torch.tensor(boxes(browser, "Number(box.style.getPropertyValue('--amount'))"))
    expected = weights[7] if way == "from" else weights[:, 7]
    strongest = expected.max()
    torch.testing.assert_close(amounts[:-1] * strongest, expected, atol=1 / 255, rtol=0)
    percentage = text_of(browser, "legend").split()[-1]
    assert float(percentage.strip("%")) / 100 == pytest.approx(strongest.item(), abs=1 / 255)
    previous = weights.diagonal(-1).mean().item()
    said = text_of(browser, "head")
    assert "layer 1, head 1" in said and f"on average {previous:.0%}"[:-2] in said


def test_what_layers_say_is_the_head_on_their_output(browser, open_page):
    model = make_model()
    ids = open_page(model, TEXT)
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
    open_page(make_model(), TEXT)
    press(browser, "HOME")
    assert current(browser) == 0
    assert "was not predicted" in text_of(browser, "current")
    press(browser, "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT")
    assert current(browser) == 1
    press(browser, "END", "ARROW_RIGHT")
    assert current(browser) == 19
    point_at(browser, "id", "token4")
    assert current(browser) == 4
    press(browser, "ENTER")
    point_at(browser, "id", "token8")
    assert current(browser) == 4  # pinned
    browser.find_element("id", "token9").click()
    point_at(browser, "id", "token2")
    assert current(browser) == 9
    press(browser, "ESCAPE")
    point_at(browser, "id", "token3")
    assert current(browser) == 3
    point_at(browser, "tag name", "h1")
    assert current(browser) == 9  # the one that was chosen
    # the heads and the sliders by keys alone
    browser.execute_script("document.querySelector('[name=head]').focus()")
    press(browser, "ARROW_RIGHT")
    assert "layer 0, head 0" in text_of(browser, "head")
    press(browser, "ARROW_DOWN")
    assert "layer 1, head 0" in text_of(browser, "head")
    browser.execute_script("document.getElementById('temperature').focus()")
    press(browser, "ARROW_LEFT")
    assert browser.find_element("css selector", "#temperature + output").text == "0.9"
    assert current(browser) == 9


def test_a_hostile_text_is_shown_and_runs_nothing(browser, open_page):
    open_page(make_model(), HOSTILE)
    go_to(browser, 3)
    assert browser.get_log("browser") == []  # an alert would make the calls above fail, too
    counts = "return ['script', 'img'].map((tag) => document.getElementsByTagName(tag).length)"
    assert browser.execute_script(counts) == [2, 0]
    shown = "".join(boxes(browser, "box.textContent")[:-1]).replace("␣", " ")
    assert shown == HOSTILE.replace("\u2028", "\\xe2\\x80\\xa8")


@pytest.mark.parametrize("width", [320, 1280])
def test_the_page_fits_its_window(browser, open_page, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    open_page(make_model(n_layer=12, n_head=8), TEXT, new=80)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_text_of_one_token_has_a_page(browser, open_page):
    open_page(make_model(n_layer=1, n_head=1), "T")
    assert current(browser) == 1
    assert browser.get_log("browser") == []
