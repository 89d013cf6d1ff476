"""The page in a real browser, where one is installed: Chromium, headless.

The page runs unchanged in a frame as wide as the screen in question. The
script around it clicks, types and measures, and writes what it found into the
document, which Chromium prints.
"""

import html
import json
import os
import re
import shutil
import subprocess

import pytest
from test_report.cases import small_network, some_images

from mmdbb.report import network_report, page

BROWSER = os.environ.get('MMDBB_BROWSER') or next(
    filter(
        None,
        map(
            shutil.which,
            ('chromium', 'chromium-browser', 'google-chrome', 'chrome'),
        ),
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason='no Chromium; MMDBB_BROWSER names one'
)
OPTIONS = (
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--hide-scrollbars',
)
#: What a test does with the page: `doc`, its window `win`, and `out`.
USE = """
const names = table => [...table.tBodies[0].rows].map(
  row => row.cells[0].textContent);
const visible = table => [...table.tBodies[0].rows].filter(
  row => !row.hidden).length;
const tables = [...doc.querySelectorAll('table.sortable')];
const layers = tables.find(
  table => table.caption.textContent === 'Layers');
const head = text => [...layers.tHead.rows[0].cells].find(
  cell => cell.textContent.startsWith(text));
const sort = text => { head(text).querySelector('button').click();
  return [names(layers), head(text).getAttribute('aria-sort')]; };
out.order = names(layers);
out.snr = sort('SNR'); out.snrAgain = sort('SNR'); out.spread = sort('Spread');
out.marked = layers.querySelectorAll('[aria-sort]').length;
out.back = sort('Layer');

const filter = doc.getElementById('filter');
const type = text => { filter.value = text;
  filter.dispatchEvent(new win.Event('input')); return visible(layers); };
out.typed = type('3'); out.said = doc.getElementById('shown').textContent;
out.details = doc.querySelectorAll('details.layer:not([hidden])').length;
out.cleared = type('');

const wide = () => doc.documentElement.scrollWidth;
out.width = wide();
const all = doc.getElementById('all');
const opened = () => doc.querySelectorAll('details[open]').length;
all.click(); out.opened = opened(); out.openWidth = wide();
out.pressed = all.getAttribute('aria-pressed'); all.click();
out.closed = opened();

// Every text against the colour behind it.
const channels = colour => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(
  v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce(
  (sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = channels(win.getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const contrast = () => {
  let worst = [99, ''];
  for (const element of doc.querySelectorAll('body *')) {
    if (!element.checkVisibility() || element.closest('svg')) continue;
    const own = [...element.childNodes].some(
      node => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.matches('.visually-hidden, .skip')) continue;
    const pair = [channels(win.getComputedStyle(element).color),
      behind(element)].map(light).sort();
    const found = (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
    if (found < worst[0])
      worst = [found, element.outerHTML.slice(0, 120)];
  }
  return worst;
};
all.click();
const page = () => win.getComputedStyle(doc.body).backgroundColor;
out.contrast = contrast(); out.first = page();
const theme = doc.getElementById('theme');
out.label = theme.getAttribute('aria-label');
theme.click(); out.second = page(); out.otherContrast = contrast();
theme.click(); out.third = page();
all.click();

win.location.hash = '#layer-3';
await new Promise(done => setTimeout(done, 50));
out.followed = [...doc.querySelectorAll('details[open]')].map(d => d.id);
out.focused = doc.activeElement.parentElement.id;
// What a keyboard reaches, in order.
const stops = [...doc.querySelectorAll(
  'a, button, input, summary, [tabindex]')]
  .filter(e => e.tabIndex >= 0 && e.checkVisibility());
out.stops = stops.map(e => e.id || e.tagName);
out.small = stops.filter(e => e.matches('button, input, summary'))
  .map(e => [e.getBoundingClientRect().height, e.outerHTML.slice(0, 60)])
  .filter(([height]) => height < 24);
"""


def use(text, folder, width, dark):
    """Use the page in the browser; what the script found."""
    script = (
        'const out = {errors: []}; const frame = document.querySelector('
        "'iframe'); frame.addEventListener('load', async () => { try {"
        'const win = frame.contentWindow, doc = frame.contentDocument;'
        "win.addEventListener('error', e => out.errors.push(e.message));"
        "doc.addEventListener('securitypolicyviolation', "
        'e => out.errors.push(e.blockedURI));'
        f'{USE}'
        '} catch (error) { out.errors.push(String(error)); }'
        "const pre = document.createElement('pre'); pre.id = 'found';"
        'pre.textContent = JSON.stringify(out); document.body.append(pre);'
        '}, {once: true});'
        f'frame.srcdoc = {json.dumps(text)};'.replace('</', '<\\/')
    )
    harness = folder / 'harness.html'
    harness.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><body>'
        f'<iframe style="width:{width}px;height:800px;border:0"></iframe>'
        f'<script>{script}</script>',
        encoding='utf-8',
    )
    run = subprocess.run(
        [
            BROWSER,
            *OPTIONS,
            f'--user-data-dir={folder / "profile"}',
            f'--blink-settings=preferredColorScheme={0 if dark else 1}',
            '--virtual-time-budget=5000',
            '--window-size=1400,900',
            '--dump-dom',
            harness.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.S)
    assert found, run.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope='module')
def report():
    return network_report(small_network(), some_images())


@pytest.mark.parametrize('width, dark', [(1280, False), (360, True)])
def test_a_reader_uses_the_page(report, tmp_path, width, dark):
    found = use(page(report), tmp_path, width, dark)
    assert not found['errors']
    by = {x.name: x for x in report.layers}
    assert found['order'] == ['0', '3', '5', '7']
    rising = sorted(by, key=lambda name: by[name].range.snr)
    assert found['snr'] == [rising, 'ascending']
    assert found['snrAgain'] == [rising[::-1], 'descending']
    falling = sorted(by, key=lambda name: -by[name].range.spread)
    assert found['spread'] == [falling, 'descending']
    assert found['marked'] == 1
    assert found['back'] == [['0', '3', '5', '7'], 'ascending']
    assert (found['typed'], found['said']) == (1, '1 shown')
    assert (found['details'], found['cleared']) == (1, 4)
    # Nothing but the tables scrolls sideways.
    assert found['width'] <= width and found['openWidth'] <= width
    assert (found['opened'], found['closed']) == (4, 0)
    assert found['pressed'] == 'true'
    assert found['contrast'][0] >= 4.5, found['contrast']
    assert found['otherContrast'][0] >= 4.5, found['otherContrast']
    assert found['first'] == found['third'] != found['second']
    dark_page = 'rgb(15, 19, 23)'
    assert (found['first'] == dark_page) is dark
    assert (found['second'] == dark_page) is not dark
    assert found['label'].startswith(
        f'Switch to {"light" if dark else "dark"}'
    )
    assert found['followed'] == ['layer-3'] and found['focused'] == 'layer-3'
    assert not found['small'], found['small']
    stops = found['stops']
    assert stops.count('SUMMARY') == 4 and 'filter' in stops
    assert stops.index('theme') < stops.index('filter') < stops.index('all')


def test_without_a_script_all_is_there(report, tmp_path):
    """The policy of the page itself forbids scripts here."""
    text = page(report).replace("script-src 'unsafe-inline'; ", '')
    harness = tmp_path / 'page.html'
    harness.write_text(text, encoding='utf-8')
    picture = tmp_path / 'page.png'
    subprocess.run(
        [
            BROWSER,
            *OPTIONS,
            f'--user-data-dir={tmp_path / "profile"}',
            '--window-size=1280,1600',
            f'--screenshot={picture}',
            harness.as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    image = pytest.importorskip('PIL.Image').open(picture).convert('RGB')
    assert image.size == (1280, 1600)
    # The chart's colours, and the page's light ground.
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert {(0, 114, 178), (230, 159, 0), (246, 247, 248)} <= colours
