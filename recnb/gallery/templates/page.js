document.documentElement.classList.add("js");
const at = id => document.getElementById(id), list = at("queries"), all = [...list.children];
const keys = {given: li => +li.dataset.place, index: li => +li.dataset.q, worst: li => +li.dataset.ap,
              best: li => li.dataset.ap > 1 ? 2 : -li.dataset.ap};
const article = li => at("q" + li.dataset.q);
let shown = all, now = 0;

function go(i) {
  now = Math.max(0, Math.min(i, shown.length - 1));
  for (const li of all) {
    const on = li === shown[now], link = li.firstElementChild;
    article(li).classList.toggle("now", on);
    if (on) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
  }
  at("count").textContent = shown.length ? `${now + 1} of ${shown.length}` : "none";
  at("prev").disabled = now <= 0;
  at("next").disabled = now >= shown.length - 1;
  const nav = list.parentElement, frame = nav.getBoundingClientRect(), box = shown[now]?.getBoundingClientRect();
  if (box && (box.top < frame.top || box.bottom > frame.bottom))
    nav.scrollTop += box.top - frame.top - frame.height / 3;
}

function update() {
  const current = shown[now], find = at("find").value.toLowerCase(), key = keys[at("order").value];
  shown = all.filter(li => (!at("failed").checked || li.className === "wrong")
                           && li.textContent.toLowerCase().includes(find));
  shown.sort((a, b) => key(a) - key(b) || a.dataset.place - b.dataset.place);
  for (const li of all) li.hidden = !shown.includes(li);
  list.append(...shown);
  go(shown.indexOf(current));
}

function follow() {
  const target = all.find(li => "#q" + li.dataset.q === location.hash);
  if (!target) return;
  if (!shown.includes(target)) { at("failed").checked = false; at("find").value = ""; update(); }
  go(shown.indexOf(target));
}

function step(by) {
  go(now + by);
  if (shown.length) history.replaceState(null, "", "#q" + shown[now].dataset.q);
}

addEventListener("popstate", follow);
addEventListener("click", event => {
  const link = event.target.closest('a[href^="#q"]');
  if (!link) return;
  event.preventDefault();
  if (shown.length) history.replaceState(null, "", "#q" + shown[now].dataset.q);
  history.pushState(null, "", link.getAttribute("href"));
  follow();
  if (!link.closest("nav")) article(shown[now]).focus({preventScroll: true});
});
addEventListener("keydown", event => {
  const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!by || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("select, [type=search]")) return;
  event.preventDefault();
  step(by);
});
at("prev").onclick = () => step(-1);
at("next").onclick = () => step(1);
for (const id of ["order", "failed", "find"]) at(id).oninput = update;
at("controls").hidden = false;
update();
follow();
addEventListener("load", () => scrollTo(0, 0));
