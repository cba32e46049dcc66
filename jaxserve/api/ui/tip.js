// One tooltip for the whole page, beside what it explains and inside the window.

const tip = document.getElementById("tip");

export function showTip(anchor, ...content) {
  const box = anchor instanceof Element ? anchor.getBoundingClientRect() : { left: anchor.x, right: anchor.x, top: anchor.y - 8, bottom: anchor.y + 12 };
  tip.replaceChildren(...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
  const below = box.bottom + 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${below + height > innerHeight - 8 ? Math.max(8, box.top - height - 6) : below}px`;
}

export function hideTip() {
  tip.hidden = true;
}

addEventListener("scroll", hideTip, { capture: true, passive: true });
addEventListener("hashchange", hideTip);
